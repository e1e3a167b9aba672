"""The catalogue: every transformation of fxopt, by name."""

if __name__ != "fxopt.transformations":
    raise ImportError(f"{__name__!r} is not importable by that name; write `import fxopt.transformations`")
