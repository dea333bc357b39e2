"""A teacher in a process of its own: top-k log-probabilities on request."""

import multiprocessing
from pathlib import Path

import torch

from .._checks import check_positive
from ..distill import TopK


def _serve(connection, path: str, k: int, temperature: float, threads: int) -> None:
    """The process: load, say so, answer until the other side goes."""
    from .heads import top_k_of
    from .teacher_caching import load

    torch.set_num_threads(threads)
    try:
        model, _ = load(path)
    except (ValueError, OSError) as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            ids = torch.from_numpy(connection.recv())
        except EOFError:
            return
        try:
            kept = top_k_of(model, ids, k, temperature=temperature)
        except (ValueError, RuntimeError, IndexError) as error:
            connection.send(str(error))
        else:
            connection.send((kept.ids.numpy(), kept.logprobs.numpy()))


class TeacherProcess:
    """A checkpoint folder's model in another process, asked for its top-k.

    `submit` and `result` let the teacher work while the student does; `top_k` is both at once.

    Args:
        path: checkpoint folder.
        k: tokens kept at each position.
        temperature: of the teacher's softmax.
        threads: of the process.

    Use it in a `with` statement, or call `close`.

    Raises:
        ValueError: the process cannot load the folder; says why.
        RuntimeError: the process failed or is gone.
    """

    def __init__(self, path: str | Path, k: int, *, temperature: float = 1.0, threads: int = 1):
        check_positive("TeacherProcess", k=k, temperature=temperature, threads=threads)
        self.temperature = temperature
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, str(path), k, temperature, threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        if (reason := self._receive()) is not None:
            self.close()
            raise ValueError(f"TeacherProcess: {reason}")

    def __enter__(self) -> "TeacherProcess":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def submit(self, input_ids: torch.Tensor) -> None:
        """Token ids (batch, seqlen) to work on."""
        try:
            self._connection.send(input_ids.cpu().numpy())
        except (BrokenPipeError, OSError) as error:
            raise RuntimeError("TeacherProcess: the teacher's process has ended") from error

    def result(self) -> TopK:
        """The answer to the oldest `submit` without one."""
        answer = self._receive()
        if isinstance(answer, str):
            raise RuntimeError(f"TeacherProcess: {answer}")
        ids, logprobs = (torch.from_numpy(x) for x in answer)
        return TopK(ids, logprobs, temperature=self.temperature)

    def top_k(self, input_ids: torch.Tensor) -> TopK:
        """The k most likely next tokens after each position (batch, seqlen, k)."""
        self.submit(input_ids)
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self):
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.exitcode
            raise RuntimeError(f"TeacherProcess: the teacher's process ended ({code})") from error
