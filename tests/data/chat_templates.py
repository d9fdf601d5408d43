"""Small chat templates in Jinja, each with one trait of published ones."""

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
)
# Writes an empty block of thoughts before the last answer only; reasoning of earlier answers is
# dropped. A variable puts the empty block into the prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content | default('') | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# The generation prompt opens a block that a plain answer does not have.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The generation prompt opens the block of thoughts, with more white space than the answer has.
BEGUN = THINKING.replace("{% if enable", "<think>\n\n{% if false and enable")
NO_PROMPT = PLAIN.removesuffix(ASK)
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{{ ' final' if m.role == 'assistant' else '' }}\n{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# Writes eos after a whole conversation only.
LAST_EOS = PLAIN.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
TWO_MARKS = PLAIN.replace(
    "<|im_end|>\n", "<|im_end|>{{ eos_token if m.role == 'assistant' else '' }}\n"
)
# What stands before an answer depends on how long the conversation is.
COUNTS = "{{ messages | length }}" + PLAIN
# Strips the text of some roles.
STRIPS_SOME = PLAIN.replace(
    "{{ m.content }}", "{{ m.content if m.role == 'system' else m.content | trim }}"
)
# Looks at how a text ends.
LOOKS = PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{{ '' if m.content.endswith('?') else '~' }}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASK
)
# Writes marks of their own for the system, tools, calls and results, and takes ids of 9 letters.
ROLES = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% else %}{{ '<|' + m.role + '|>' }}\n{% endif %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}"
    "{{ raise_exception('a bad id') }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASK
)
# Writes the results of calls as JSON text.
RESULTS = TOOLS.replace(
    "{{ m.content }}", "{{ m.content | trim | tojson if m.role == 'tool' else m.content }}"
)
# Asks for the date.
DATED = "{{ strftime_now('%d %B %Y') }}\n" + PLAIN
ALL = {
    name.lower(): value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, str) and name != "ASK"
}
