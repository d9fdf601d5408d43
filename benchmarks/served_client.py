"""Many streams at once from a server, by OpenAI's own client, in a process of its own.

Told what to ask by lines of JSON, `{"url", "texts", "tokens"}`; answers each with a line,
`{"seconds", "tokens", "first"}`: to the end of the last stream, said in all, and to the first
token of the middle one.
"""

import asyncio
import json
import statistics
import sys
import time

import openai


async def one(client: openai.AsyncOpenAI, text: str, tokens: int) -> tuple[int, float]:
    """How many tokens an answer has, and when its first text came."""
    stream = await client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": text}],
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    said, first = 0, 0.0
    async for chunk in stream:
        first = first or time.perf_counter()
        said = chunk.usage.completion_tokens if chunk.usage else said
    return said, first


async def main() -> None:
    """Ask what each line says."""
    for line in sys.stdin:
        asked = json.loads(line)
        async with openai.AsyncOpenAI(base_url=asked["url"], api_key="none") as client:
            start = time.perf_counter()
            calls = (one(client, text, asked["tokens"]) for text in asked["texts"])
            said = await asyncio.gather(*calls)
            seconds = time.perf_counter() - start
        first = statistics.median(at for _, at in said) - start
        told = {"seconds": seconds, "tokens": sum(n for n, _ in said), "first": first}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
