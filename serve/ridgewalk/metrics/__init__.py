"""The metric catalogue, the recorders that fill it, and the merge that answers one scrape for the whole service.

Pure: no torch, no Ray. Of the other packages only plain sizes (`placement`) are read at run time.
"""
