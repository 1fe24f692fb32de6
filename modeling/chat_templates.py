"""Chat templates: the paper's Vicuna v1.5 format, and a prefix that lets a text-only template take pictures."""

from collections.abc import Callable

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

render_conversations: Callable[..., tuple[list[str], list]] = render_jinja_template  # type: ignore[assignment]
"""Transformers' own, annotated as what it is: conversations -> their texts, and the characters of generation marks."""

VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# [BOS][image tokens]SYSTEM USER: question ASSISTANT: answer</s>USER: ... (paper release, Vicuna v1.5 prompter). Every
# picture of the conversation stands right after BOS. What the model must learn, from the space before an answer to its
# </s>, is inside the generation marks; a prompt for generation ends in "ASSISTANT:".
_VICUNA_FORMAT = (
    """
{%- macro text_of(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token | default('') -}}
{%- for message in messages if message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}
    {{- image_token | default('<image>') -}}
  {%- endfor -%}
{%- endfor -%}
{{- TEXT_START -}}
{%- if messages[0]['role'] == 'system' -%}
  {{- text_of(messages[0]) | trim -}}
{%- else -%}
  {{- """
    + repr(VICUNA_SYSTEM_PROMPT)
    + """ -}}
{%- endif -%}
{{- ' ' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + (text_of(message) | trim) -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ASSISTANT:' -}}
    {%- generation -%}
      {{- ' ' + (text_of(message) or ' ') + (eos_token | default('')) -}}
    {%- endgeneration -%}
  {%- elif not (loop.first and message['role'] == 'system') -%}
    {{- raise_exception('The roles are user and assistant, after at most one system message in front; got '
        + message['role'] + '.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
)
VICUNA_TEMPLATE = _VICUNA_FORMAT.replace("{{- TEXT_START -}}\n", "")


def vicuna_template(tokenizer) -> str:
    """The Vicuna v1.5 template whose text behind BOS and pictures is tokenised as if it stood at the start of a text.

    The paper tokenises the text alone and puts BOS and pictures in front of the tokens. Llama tokenizers begin a text
    with the token of a word behind a space; for those that do not do so behind a special token, the template has the
    space itself.
    """
    special = tokenizer.bos_token or tokenizer.eos_token or ""
    alone, behind, behind_space = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (
            VICUNA_SYSTEM_PROMPT,
            f"{special}{VICUNA_SYSTEM_PROMPT}",
            f"{special} {VICUNA_SYSTEM_PROMPT}",
        )
    )
    needs_space = behind[1:] != alone and behind_space[1:] == alone
    return _VICUNA_FORMAT.replace("TEXT_START", "' '") if needs_space else VICUNA_TEMPLATE


# Most text-only templates add strings to `message['content']`. This prefix turns content lists into strings first: each
# picture becomes the image token on a line of its own in front of the text.
_CONTENT_LISTS_TO_STRINGS = """
{%- set _flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is not iterable -%}
    {%- set _flat.messages = _flat.messages + [message] -%}
  {%- else -%}
    {%- set _flat.text = '' -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {%- set _flat.text = _flat.text + (image_token | default('<image>')) + '\\n' -%}
    {%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- set _flat.text = _flat.text + part['text'] -%}
    {%- endfor -%}
    {%- set _flat.messages = _flat.messages + [dict(message, content=_flat.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = _flat.messages -%}
"""


_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]


def with_images(template: str, **variables: str) -> str:
    """A template that renders pictures: the given one where it can, else the given one behind a short prefix.

    The prefix flattens content lists into strings, so that the template of a text-only language model can be used as it
    is. The result is self-contained: other servers that read `chat_template.jinja` render the same prompt.

    Args:
        template: Jinja source of a chat template.
        variables: what the template sees beside `messages`; `image_token` must be among them.

    Raises:
        ValueError: the template loses the picture either way.
    """
    for candidate in (template, _CONTENT_LISTS_TO_STRINGS + template):
        try:
            (text,), _ = render_conversations([_PROBE], chat_template=candidate, **variables)
        except (TypeError, jinja2.TemplateError):  # adding a list to a string, or a message of the template's own
            continue
        if text.count(variables["image_token"]) == 1 and "probe" in text:
            return candidate
    raise ValueError(
        f"The chat template does not render {variables['image_token']!r} once for a user message of one picture and a "
        "text: give the processor a chat_template that does."
    )
