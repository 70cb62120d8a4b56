"""Several images in flight over ranks that each hold one stage of the denoisers."""
