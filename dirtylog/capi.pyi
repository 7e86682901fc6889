__all__: list[str]

_C_API: object
