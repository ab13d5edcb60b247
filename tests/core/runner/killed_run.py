"""A run to be killed: grades against a server that logs what it is asked. See test_resume.py."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from rm_gallery.core.graders.base_grader import BaseGrader, GraderScore
from rm_gallery.core.runner import GradingRunner


class AskingGrader(BaseGrader):
    """Sends the sample's number to a server, a line, and takes the line that comes back for the score."""

    def __init__(self, port: int) -> None:
        super().__init__("asking")
        self._port = port

    async def aevaluate(self, number: int) -> GraderScore:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(f"{number}\n".encode())
            return GraderScore(name=self.name, score=float(await reader.readline()))
        finally:
            writer.close()


def run(port: int, path: str, num_samples: int, max_concurrency: int) -> dict[str, list[Any]]:
    dataset = ({"number": number} for number in range(num_samples))
    return GradingRunner({"asking": AskingGrader(port)}, max_concurrency, output_path=path).run(dataset)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
