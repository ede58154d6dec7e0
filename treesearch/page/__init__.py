"""The live page of `treesearch serve`: looks at run folders and shows them in a browser.

    listing    the runs below a folder
    view       one of them, followed while it grows: nodes as bytes, curves, summary
    pictures   thumbnails of samples
    guard      who is answered, and what a browser may do with the answer
    server     addresses
    static/    the page itself: what comes from a run is text in it, never markup

It looks: nothing in a run folder changes, and no code that one names runs.
"""
