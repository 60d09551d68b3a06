"""The model families by the ``model_type`` of a configuration."""

from __future__ import annotations

from experts.families.base import Family
from experts.families.dbrx import DBRX
from experts.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from experts.families.gpt_oss import GPT_OSS
from experts.families.grok import GROK_1, GROK_1_OF_XAI
from experts.families.mixtral import MIXTRAL
from experts.families.olmoe import OLMOE
from experts.families.qwen2_moe import QWEN2_MOE
from experts.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DBRX,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
        GROK_1,
        GROK_1_OF_XAI,
        MIXTRAL,
        OLMOE,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}
