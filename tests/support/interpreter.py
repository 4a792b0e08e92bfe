"""Triton's interpreter, with the same results in half of the time."""



def hasten() -> None:
    """Leave out work of the interpreter that has no effect."""
    from triton.runtime import interpreter  # after TRITON_INTERPRET is set (marks.py)

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    # Each call of a device function replaces triton.language's functions again.  Here only the
    # first call of a module's functions in a launch does.
    def patch_once(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            return patch_lang(function)

    def launch_once(*arguments, **settings):
        patched.clear()
        launch(*arguments, **settings)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_once
    # Each integer operation is repeated in int64, but an overflow is only reported with debug.
    assert not interpreter.interpreter_builder.options.debug
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
