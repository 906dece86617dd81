"""Tokenizing records, checked by hand with SmolLM2's tokenizer: input tokens and counted tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterkit.errors import FormatError, UsageError
from adapterkit.train.data import chat_template as chats
from adapterkit.train.data import tokenize as examples
from adapterkit.train.data.chat_template import Chats
from adapterkit.train.data.records import BadRecord, Fields, Record, read_records
from adapterkit.train.data.tokenize import Encoded, Example, encode, encode_all, split

EOS = 2  # <|im_end|>
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def shared(smollm2: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def tokenizer(shared: Any) -> Any:
    return copy.deepcopy(shared)


CHATS = Chats(None)  # one process renders for all of these tests


@pytest.fixture(scope="module", autouse=True)
def rendering() -> Iterator[None]:
    with CHATS:
        yield


def encoded(record: Record, tokenizer: Any, max_length: int = 512) -> Example | BadRecord:
    CHATS.tokenizer = tokenizer
    return encode(record, tokenizer, max_length, CHATS)


def made(record: Record, tokenizer: Any, max_length: int = 512) -> Example:
    example = encoded(record, tokenizer, max_length)
    assert isinstance(example, Example), example
    assert example.ids.dtype == np.int32 and example.counted.dtype == np.bool_
    assert example.ids.shape == example.counted.shape and example.where == record.where
    return example


def refused(record: Record, tokenizer: Any, max_length: int = 512) -> str:
    bad = encoded(record, tokenizer, max_length)
    assert isinstance(bad, BadRecord) and bad.where == record.where
    return bad.why


def chat(*turns: str, first: str = "user") -> Record:
    """Return alternating turns of user and assistant, after a system's if it is `first`."""
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(turns)
    return Record("c:1", messages=tuple({"role": r, "content": t} for r, t in zip(roles, turns, strict=False)))


def runs(example: Example, tokenizer: Any) -> list[str]:
    """Return the counted tokens as text, one string per contiguous run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.counted, [0]])))
    return [tokenizer.decode(example.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_all_tokens_of_a_text_but_the_first_count(tokenizer: Any) -> None:
    example = made(Record("t:1", text="Hi there"), tokenizer)
    assert [tokenizer.decode(i) for i in example.ids] == ["Hi", " there", "<|im_end|>"]
    assert example.counted.tolist() == [False, True, True]


def test_no_second_end_token(tokenizer: Any) -> None:
    assert made(Record("t:1", text="Hi<|im_end|>"), tokenizer).ids.tolist() == [26843, EOS]


def test_only_the_completion_of_a_prompt_counts(tokenizer: Any) -> None:
    example = made(Record("t:1", prompt="2 + 2 =", completion=" 4."), tokenizer)
    assert [tokenizer.decode(i) for i in example.ids] == ["2", " +", " ", "2", " =", " ", "4", ".", "<|im_end|>"]
    assert example.counted.tolist() == [False] * 5 + [True] * 4
    assert made(Record("t:1", prompt="", completion="4."), tokenizer).counted.tolist() == [False, True, True]


class Special:
    """A tokenizer of characters that adds 1 before, and on request 2 after, if it has special tokens."""

    chat_template = None

    def __init__(self, ends: bool, eos: int | None = 2) -> None:
        self.ends, self.eos_token_id = ends, eos

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [ord(one) for one in text]
        return {"input_ids": [1, *ids, *[2] * self.ends] if add_special_tokens else ids}

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def test_special_tokens_of_other_tokenizers() -> None:
    prompted = Record("t:1", prompt="a", completion="b")
    assert made(Record("t:1", text="ab"), Special(ends=False)).ids.tolist() == [1, 97, 98, 2]
    assert made(Record("t:1", text="ab"), Special(ends=True)).ids.tolist() == [1, 97, 98, 2]
    assert made(prompted, Special(ends=False)).ids.tolist() == [1, 97, 98, 2]
    assert made(prompted, Special(ends=False)).counted.tolist() == [False, False, True, True]
    assert made(prompted, Special(ends=False, eos=None)).ids.tolist() == [1, 97, 98]
    assert refused(Record("t:1", text=""), Special(ends=False, eos=None)) == "has no token to learn (1 in total)"


def test_only_the_assistants_turns_of_a_chat_count(tokenizer: Any) -> None:
    example = made(chat("2+2?", "4"), tokenizer)
    assert tokenizer.decode(example.ids) == (
        SYSTEM + "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert [tokenizer.decode(i) for i in example.ids[-5:]] == ["istant", "\n", "4", "<|im_end|>", "\n"]
    assert example.counted.tolist() == [False] * (len(example.ids) - 3) + [True, True, False]


def test_several_turns_and_a_system(tokenizer: Any) -> None:
    example = made(chat("Be brief.", "Où ?", " Là-bas 🙂. \n", "user", "assistant", first="system"), tokenizer)
    assert tokenizer.decode(example.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOù ?")
    assert runs(example, tokenizer) == [" Là-bas 🙂. \n<|im_end|>", "assistant<|im_end|>"]


def test_a_chat_may_end_with_the_user(tokenizer: Any) -> None:
    assert runs(made(chat("a", "b", "c"), tokenizer), tokenizer) == ["b<|im_end|>"]


def test_two_turns_of_the_assistant_in_a_row(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}] + [{"role": "assistant", "content": text} for text in ("b", "c")]
    assert runs(made(Record("c:1", messages=tuple(turns)), tokenizer), tokenizer) == ["b<|im_end|>", "c<|im_end|>"]


def test_counted_tokens_are_those_to_generate(tokenizer: Any) -> None:
    """The input before the first counted token is the prompt for generation."""
    record = chat("a", "b", "c", "d")
    example = made(record, tokenizer)
    prompt = tokenizer.apply_chat_template(
        list(record.messages or ())[:3], add_generation_prompt=True, return_dict=False
    )
    starts = np.flatnonzero(np.diff(example.counted.astype(int)) == 1) + 1
    assert example.ids[: starts[1]].tolist() == prompt


def test_a_template_that_renders_earlier_turns_differently(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}{{ m.content }}"
    )
    assert "renders turn 2 differently" in refused(chat("a", "b", "c", "d"), tokenizer)
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert "renders turn 2 differently" in refused(chat("a", "b"), tokenizer)
    tokenizer.chat_template = CHATML
    assert runs(made(chat("a", "b", "c", "d"), tokenizer), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_raises(tokenizer: Any) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = refusal + CHATML
    assert refused(chat("s", "a", "b", first="system"), tokenizer) == "the chat template rejects it: no system here"
    assert runs(made(chat("a", "b"), tokenizer), tokenizer) == ["b<|im_end|>"]
    tokenizer.chat_template = "{{ messages[0].content + 5 }}"
    assert refused(chat("a", "b"), tokenizer).startswith("the chat template rejects it: ")


def test_a_chat_that_starts_with_the_assistant(tokenizer: Any) -> None:
    record = Record("c:1", messages=({"role": "assistant", "content": "a"},))
    assert "the chat template rejects it: " in refused(record, tokenizer)


def test_no_chat_template() -> None:
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        encoded(chat("a", "b"), Special(ends=False))


# --- strangers' templates --------------------------------------------------------------------------------------------

# In the ways of Llama 3.1, Mistral, Gemma, Qwen 3, DeepSeek and Phi: namespaces, slices, filters, macros, loop controls.
TEMPLATES = {
    "llama": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}{{- message.content | tojson }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{%- macro part(content) -%}{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for item in content -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- for message in messages -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}{{ part(message['content']) }}{{ '<end_of_turn>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}""",
    "qwen": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in message.content else message.content %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "deepseek": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, system='') -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = ns.system ~ message['content'] %}
{%- continue %}{%- endif %}{%- endfor -%}{{bos_token}}{{ns.system}}
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' ~ message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' %}{{'<｜Assistant｜>' ~ message['content'] ~ '<｜end｜>'}}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}""",
    "phi": """{% for message in messages %}{% if message['role'] in ['user', 'system'] %}
{{'<|' ~ message['role'] ~ '|>\\n' + message['content'] + '<|end|>\\n'}}{% else %}{% generation %}{{'<|assistant|>\\n' + message['content']
+ '<|end|>\\n'}}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_as_in_transformers(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template, CHATS.tokenizer = TEMPLATES[name], tokenizer
    for record in (
        chat("Où ?", "Là 🙂."), chat("a", " b \n", "c", "<think>x</think>\n\nd"), chat("s", "a", "b", first="system"),
        Record("c:1", messages=(
            {"role": "user", "content": "q", "name": None},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1.5, True]}}}]},
            {"role": "tool", "content": "<&'>"}, {"role": "assistant", "content": "\\u00e9\x00\u2028"},
        )),
    ):  # fmt: skip
        messages = list(record.messages or ())
        try:
            wanted = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            with pytest.raises(chats.RefusedError, match=re.escape(f"the chat template rejects it: {error}")):
                CHATS.text_of(messages)
            continue
        try:
            text, spans = CHATS.text_of(messages)
        except chats.RefusedError as error:
            assert "differently when it is generated" in str(error)
            continue
        assert text == wanted
        for at, (begin, end) in zip(
            [n for n, one in enumerate(messages) if one["role"] == "assistant"], spans, strict=True
        ):
            assert text[:begin] == tokenizer.apply_chat_template(
                messages[:at], tokenize=False, add_generation_prompt=True
            )
            assert text[:end] == tokenizer.apply_chat_template(messages[: at + 1], tokenize=False).rstrip()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[1, 2]) %}{% for _ in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x + [1] }}{{ ns.x | string | length }}",
        "{{ 9 ** (9 ** 9) % 7 }}", "{{ lipsum(10 ** 9) }}",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_endless_template_is_stopped(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CPU time, so that it doesn't depend on the load of the machine."""
    monkeypatch.setattr(chats, "SECONDS", 0)  # until its next whole second
    tokenizer.chat_template = template
    with pytest.raises(FormatError, match="c:1: the chat template (took more than 0 s of CPU time|rejects it: )"):
        encode_all([chat("a", "b")], tokenizer, 64)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}", "{{ 'a'.ljust(10 ** 10) }}", "{{ '%10000000000d' % 1 }}", "{{ '{:10000000000}'.format(1) }}",
        "{% set ns = namespace(x='ab') %}{% for _ in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ messages | tojson(indent=10 ** 10) }}", "{{ [1] * 10 ** 10 }}", "{{ range(10 ** 10) | list }}",
        "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__ }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ unknown.x.y }}", "{% for %}", "{% include '/etc/passwd' %}",
        "{{ messages | map(attribute='x.' * 9) | list }}{{ 1 / 0 }}", "{{ messages[9].content + 'x' }}", "{% block a %}{{ self.a() }}{% endblock %}",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_template_that_exceeds_memory_or_escapes_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    reason = refused(chat("a", "b"), tokenizer)
    assert "the chat template " in reason and not reason.endswith("rejects it: ")
    tokenizer.chat_template = CHATML
    assert runs(made(chat("a", "b"), tokenizer), tokenizer) == ["b<|im_end|>"]  # the process that renders goes on


def test_a_template_with_too_much_output(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = "{{ 'a ' * 3000000 }}" + CHATML
    assert refused(chat("a", "b"), tokenizer).startswith("has 6,000,0")
    monkeypatch.setattr(chats, "LINE", 5_000_000)
    with pytest.raises(FormatError, match="c:1: the chat template produced more than 5,000,000 characters"):
        encode_all([chat("a", "b")], tokenizer, 64)


def test_a_record_is_truncated_before_it_is_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_CHARACTERS", 100)
    why = "has 105 characters, expected at most 100; split it into several records"
    assert refused(Record("t:1", text="ab " * 35), tokenizer, 9) == why
    assert refused(Record("t:1", prompt="ab " * 34, completion="abc"), tokenizer, 9) == why
    assert refused(chat("a", "b " * 60), tokenizer, 9).endswith(
        "characters, expected at most 100; split it into several records"
    )
    assert made(Record("t:1", text="ab " * 33), tokenizer, 9).cut > 0
    assert len(made(Record("t:1", text="ab " * 35), tokenizer, 200).ids) > 35  # a higher limit reads more


def test_truncation_cuts_the_end(tokenizer: Any) -> None:
    record = Record("t:1", prompt="one two three", completion=" four five six")
    whole, cut = made(record, tokenizer, 7), made(record, tokenizer, 5)
    assert [len(whole.ids), whole.cut, len(cut.ids), cut.cut] == [7, 0, 5, 2]
    assert tokenizer.decode(cut.ids) == "one two three four five" and runs(cut, tokenizer) == [" four five"]
    assert refused(record, tokenizer, 3) == "the prompt alone has 3 tokens, `max_length` is 3"
    assert runs(made(record, tokenizer, 4), tokenizer) == [" four"]


def test_encoding_all_records(tokenizer: Any) -> None:
    records = [
        Record("t:1", text="one two"),  # 3 tokens, 2 counted
        Record("t:2", text="one two three four five"),  # 6 tokens, cut to 4, 3 counted
        BadRecord("t:3", "'text' is empty"),
        Record("t:4", prompt="one two three four", completion=" five"),
        Record("t:5", prompt="one", completion=" two"),  # 3 tokens, 2 counted
    ]
    encoded = encode_all(records, tokenizer, 4, skip_bad=True)
    assert [example.where for example in encoded.examples] == ["t:1", "t:2", "t:5"]
    assert encoded.records == (records[0], records[1], records[4])
    assert encoded.truncated == ("t:2",)
    assert encoded.bad == (records[2], BadRecord("t:4", "the prompt alone has 4 tokens, `max_length` is 4"))
    assert (encoded.tokens, encoded.counted) == (3 + 4 + 3, 2 + 3 + 2)
    with pytest.raises(FormatError) as caught:
        encode_all(records, tokenizer, 4, skip_bad=False)
    assert str(caught.value).splitlines() == [
        "2 of 5 records cannot be used",
        "  t:3: 'text' is empty",
        "  t:4: the prompt alone has 4 tokens, `max_length` is 4",
        "fix them, or skip them with `skip_bad=True`",
    ]


def test_many_bad_records_are_counted_and_ten_listed(tokenizer: Any) -> None:
    bad = [BadRecord(f"t:{number}", "is empty") for number in range(1, 14)]
    with pytest.raises(FormatError) as caught:
        encode_all([*bad, Record("t:14", text="one two")], tokenizer, 8, skip_bad=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 of 14 records cannot be used" and lines[10] == "  t:10: is empty"
    assert lines[11] == "  and 3 more" and "`skip_bad=True`" in lines[12]
    with pytest.raises(FormatError, match="13 of 13 records cannot be used") as caught:
        encode_all(bad, tokenizer, 8, skip_bad=True)
    assert "skip_bad" not in str(caught.value)  # it would not help


def test_nothing_to_train_on(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="no records, expected one or more"):
        encode_all([], tokenizer, 8, skip_bad=True)
    with pytest.raises(UsageError, match="`max_length` is 1, expected 2 or more"):
        encode_all([Record("t:1", text="one two")], tokenizer, 1, skip_bad=True)


def numbered(count: int) -> Encoded:
    """Return examples whose only token is their number, every third truncated."""
    yes = np.ones(1, np.bool_)
    examples = [Example(np.array([n], np.int32), yes, f"t:{n}", cut=int(n % 3 == 0)) for n in range(count)]
    return Encoded(
        tuple(examples), tuple(Record(f"t:{n}", text="x") for n in range(count)), (BadRecord("t:99", "is empty"),)
    )


def places(encoded: Encoded) -> list[int]:
    assert [example.where for example in encoded.examples] == [record.where for record in encoded.records]
    return [int(example.ids[0]) for example in encoded.examples]


def test_a_split_preserves_the_order_and_depends_on_the_seed() -> None:
    encoded = numbered(40)
    train, valid = split(encoded, 0.25, seed=3)
    assert (len(train.examples), len(valid.examples)) == (30, 10)
    assert places(train) == sorted(places(train)) and places(valid) == sorted(places(valid))
    assert sorted(places(train) + places(valid)) == list(range(40))
    assert (train.bad, valid.bad) == (encoded.bad, ())
    assert sorted(train.truncated + valid.truncated) == sorted(encoded.truncated)
    assert places(split(encoded, 0.25, seed=3)[1]) == places(valid) != places(split(encoded, 0.25, seed=4)[1])
    assert places(valid) not in (list(range(10)), list(range(30, 40)))


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (40, 0.0), (40, 1.0), (40, 0.01), (4, 0.9), (9, float("nan"))])
def test_a_split_that_leaves_one_side_empty(count: int, share: float) -> None:
    with pytest.raises(UsageError, match=f"a share of {share} of {count} records: expected one or more"):
        split(numbered(count), share, seed=0)


def test_the_smallest_split() -> None:
    assert [len(part.examples) for part in split(numbered(2), 0.5, seed=0)] == [1, 1]


def test_real_records(material: Callable[[str], Path], tokenizer: Any) -> None:
    fields = Fields(prompt="question", completion="answer")
    records = [
        one for one, _ in zip(read_records(material("text") / "gsm8k_test.jsonl", fields), range(100), strict=False)
    ]
    encoded = encode_all(records, tokenizer, 1024, skip_bad=False)
    assert len(encoded.examples) == 100 and encoded.truncated == () and encoded.bad == ()
    for example, record in zip(encoded.examples, encoded.records, strict=True):
        assert runs(example, tokenizer) == [f"{record.completion}<|im_end|>"]
        turns = ({"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion})
        assert runs(made(Record("c", messages=turns), tokenizer, 2048), tokenizer) == [f"{record.completion}<|im_end|>"]
