"""Texts and rows for the tests of this room."""

WORDS = (
    "the patient reports fever cough chest pain and shortness of breath since Monday "
    "give aspirin 75 mg daily; check blood pressure, glucose and liver enzymes. "
    "What is the diagnosis? The answer is pneumonia. 患者主诉发热咳嗽三天 Пациент жалуется"
)
CHATML = ("<|im_start|>", "<|im_end|>")


def texts() -> list[str]:
    words = WORDS.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    return lines + [f"User: {line}\tAssistant: {line}" for line in lines]


def conversation(*contents: str, system: str = "", language: str = "en") -> dict:
    """A row of alternating user and assistant turns."""
    turns = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[number % 2], "content": content})
    return {"conversations": turns, "language": language}
