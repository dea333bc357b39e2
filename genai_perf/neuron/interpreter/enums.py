"""The named constants of nki.isa, compared by identity."""


class Name:
    """One constant."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Names:
    """A group of constants."""

    def __init__(self, group: str, *names: str):
        self._names = names
        for name in names:
            setattr(self, name, Name(f"{group}.{name}"))

    def __iter__(self):
        return (getattr(self, name) for name in self._names)


engine = Names("engine", "unknown", "tensor", "vector", "scalar", "gpsimd", "dma", "sync")
matmul_perf_mode = Names("matmul_perf_mode", "none", "double_row", "double_column", "double_pixel",
                         "double_row_gen3")  # fmt: skip
reduce_cmd = Names("reduce_cmd", "idle", "reset", "reduce", "reset_reduce", "load_reduce")
oob_mode = Names("oob_mode", "error", "skip")
dge_mode = Names("dge_mode", "unknown", "none", "swdge", "hwdge")
