"""x"""
def report(*, results: str, output: str) -> None:
    """x"""
