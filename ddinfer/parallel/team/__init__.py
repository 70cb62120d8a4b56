"""One image on several ranks: the guidance calls of a step, or the tokens of one call.

A *replica* of C × P ranks makes one image. Its first rank, the *leader*, runs the pipeline; the
other ranks hold the denoisers and serve its calls. A *team* of P ranks runs one call.
"""
