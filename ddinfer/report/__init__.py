"""The page of a job: `data` reads its folder, `thumbnails` makes small pictures, `page` writes."""
