"""Chat templates that recipes call by a name: how a conversation is written in a known format."""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{{ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\
{% endif %}"""

MISTRAL = """\
{{ bos_token }}\
{% set said = messages | rejectattr('role', 'equalto', 'system') | list %}\
{% set system = messages | selectattr('role', 'equalto', 'system') | list %}\
{% for message in said %}\
{% if message['role'] == 'user' %}\
{{ '[INST] ' }}\
{% if loop.first and system %}{{ system[0]['content'] + '\\n\\n' }}{% endif %}\
{{ message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}\
{% endfor %}"""

ALPACA = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}\
{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\
{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

EXAONE = """\
{% for message in messages %}\
{{ '[|' + message['role'] + '|]' + message['content'] }}\
{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"""

BY_NAME = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "alpaca": ALPACA,
    "exaone": EXAONE,
}
