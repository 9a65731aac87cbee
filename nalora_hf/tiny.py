"""Tiny random models of transformers' families, for the survey and the tests."""
import torch

def all_of(names, value):
    return dict.fromkeys(names.split(), value)

WIDE = all_of("intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim "
              "decoder_ffn_dim shared_expert_intermediate_size shared_intermediate_size "
              "intermediate_size_mlp dense_intermediate_size moe_intermediate_size", 48)
EXPERTS = all_of("num_experts num_local_experts n_routed_experts moe_num_experts", 4)
EXPERTS |= all_of("n_group topk_group num_expert_group first_k_dense_replace n_shared_experts", 1)
EXPERTS |= all_of("num_experts_per_tok num_experts_per_token moe_topk moe_k", 2)
OTHER = all_of("hidden_size d_model n_embd embed_dim dim word_embed_proj_dim lru_width", 32)
OTHER |= all_of("num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers", 2)
OTHER |= all_of("num_attention_heads n_head num_heads n_heads mamba_n_heads", 4)
OTHER |= all_of("encoder_attention_heads decoder_attention_heads rotary_dim", 4)
OTHER |= all_of("qk_head_dim kv_lora_rank q_lora_rank sliding_window image_size", 16)
OTHER |= all_of("head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state", 8)
OTHER |= all_of("hidden_size_per_layer_input patch_size", 8)
OTHER |= all_of("vocab_size vocab_size_per_layer_input max_position_embeddings n_positions", 64)
OTHER |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "num_kv_shared_layers": 0, "use_cache": False,
          "attention_types": [[["global", "local"], 1]], "is_decoder": True,
          "is_encoder_decoder": False}
MAY_BE_UNSET = {*WIDE, *EXPERTS}
SIZES = WIDE | EXPERTS | OTHER

def tiny(config_class, **changes):
    """A configuration of a few thousand parameters: the class's own, with small SIZES."""
    default = config_class()
    names = {name for name in vars(default) if not name.startswith("_")}
    small = {name: SIZES[name] for name in names & set(SIZES)
             if type(vars(default)[name]) is type(SIZES[name])
             or vars(default)[name] is None and name in MAY_BE_UNSET}
    for name in getattr(config_class, "sub_configs", {}):
        part = vars(default).get(name)
        if part is not None:
            small[name] = tiny(type(part)).to_dict()
    return config_class(**{**small, **{k: v for k, v in changes.items() if k in names}})

# Families whose sizes must fit together in ways of their own.
SPECIAL = [{}, {"head_dim": 4}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4},
           {"num_hidden_layers": 4, "head_dim": 4, "num_key_value_heads": 4},
           {"num_experts_per_tok": 1}, {"mamba_d_head": 16, "num_hidden_layers": 4},
           {"layer_types": ["full_attention", "conv"]}]

def build(name):
    """A tiny random model of that class, in training mode. ValueError if none could be built."""
    import transformers
    errors = []
    for changes in SPECIAL:
        try:
            torch.manual_seed(0)
            model_class = getattr(transformers, name)
            model = model_class(tiny(model_class.config_class, **changes))
            loss_of(model).backward()
            model.zero_grad()
            return model.train()
        except Exception as e:  # transformers raises many kinds; the first one tells most
            errors.append(f"{type(e).__name__}: {e}")
    raise ValueError(" ".join(errors[0].split())[:160])

def loss_of(model):
    torch.manual_seed(1)  # also of what the model draws (dropout, noise of a router)
    tokens = torch.randint(3, 60, (2, 12))
    return model(input_ids=tokens).logits.float().square().mean()
