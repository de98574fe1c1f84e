"""The words that people use for the roles of a column and of a speaker."""

from __future__ import annotations

import re
import unicodedata

COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns", "대화"),
    "conversations": ("conversation", "messages", "dialogue", "dialog", "chat", "turns", "대화"),
    "instruction": ("question", "task", "prompt", "query", "지시", "지시문", "명령", "질문"),
    "input": ("context", "passage", "background", "입력", "문맥", "맥락"),
    "output": ("response", "answer", "completion", "reply", "target", "출력", "응답", "답변", "대답"),
    "prompt": (
        "question", "query", "input", "instruction", "user", "human", "q", "user_message", "source", "request",
        "problem", "질문", "물음", "프롬프트", "입력", "지시", "지시문",
    ),
    "completion": (
        "answer", "response", "output", "reply", "assistant", "bot", "a", "assistant_message", "target", "solution",
        "답변", "대답", "응답", "답", "출력", "정답",
    ),
    "text": ("content", "body", "document", "sentence", "passage", "paragraph", "텍스트", "본문", "내용", "문장", "글"),
    "source": (
        "src", "source_text", "original", "document", "article", "input", "text", "prompt", "question", "english",
        "en", "원문", "문서", "본문", "영어", "입력",
    ),
    "target": (
        "tgt", "target_text", "translation", "translated", "summary", "highlights", "output", "completion", "answer",
        "response", "korean", "ko", "번역", "번역문", "요약", "한국어", "출력",
    ),
    "label": (
        "labels", "class", "classes", "category", "categories", "sentiment", "intent", "topic", "topics", "tag",
        "tags", "target", "라벨", "레이블", "분류", "범주", "감정", "주제",
    ),
    "chosen": ("accepted", "preferred", "better", "chosen_response", "response_chosen", "선택", "선호", "좋은_답변"),
    "rejected": ("dispreferred", "worse", "rejected_response", "response_rejected", "거절", "거부", "나쁜_답변"),
    "image": (),
    "system": ("system_prompt", "system_message", "시스템"),
    "message_id": (),
    "parent_id": (),
    "role": (),
    "rank": (),
}  # fmt: skip
"""Role of a column -> other names for it, the most usual first. The role's own name comes before them all."""

KNOWN_NAMES = frozenset(COLUMN_NAMES).union(*COLUMN_NAMES.values()) | {"id", "title"}

SPEAKERS: dict[str, str] = {
    "user": "user", "human": "user", "prompter": "user", "customer": "user", "사용자": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "chatgpt": "assistant", "agent": "assistant", "어시스턴트": "assistant",
    "system": "system", "developer": "system", "시스템": "system",
}  # fmt: skip
"""Who speaks, as people write it -> as it is written in our examples."""

SPEAKER_KEYS = ("role", "from", "speaker")
WORDS_KEYS = ("content", "value", "text", "message")


def normal(name: str) -> str:
    """A column name without the differences that mean nothing: case, spaces, dashes, width, an outer BOM."""
    name = unicodedata.normalize("NFKC", name).strip("\ufeff \t\r\n\"'").lower()
    return re.sub(r"[\s_\-.]+", "_", name)
