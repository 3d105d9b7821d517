"""Models on disk: `native` is Intarsia's own format; `opening` reads and writes published families too, which are in
`families/`, a file each."""
