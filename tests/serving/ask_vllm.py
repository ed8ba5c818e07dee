"""Runs in the serving environment: vLLM's greedy answers to conversations.

Reads {"model", "conversations", "tokens"} from standard input, and writes a list of {"prompt", "answer", "text"}, of
which the first two are token ids, to the file that the only argument names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    model = LLM(asked["model"], dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=8)
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"])
    answers = [
        {"prompt": list(one.prompt_token_ids), "answer": list(one.outputs[0].token_ids), "text": one.outputs[0].text}
        for one in model.chat(asked["conversations"], sampling)
    ]
    Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
