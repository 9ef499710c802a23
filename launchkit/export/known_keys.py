"""The keys that each tool's configuration knows, for the lint.

Sources: accelerate 1.15.0 (``ClusterConfig``, the options of ``accelerate launch``), DeepSpeed 0.19.8 (the pydantic
models of its sections, ``runtime/config.py``), Axolotl 0.19.0 (``AxolotlInputConfig`` with its aliases, the Liger and
cut cross-entropy plugins, ``FSDPConfig``), TRL 1.16.0, transformers 5.23.0 (``OptimizerNames``).
"""

from __future__ import annotations

from collections.abc import Mapping


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACCELERATE = _keys(
    """
    command_file commands compute_environment debug deepspeed_config distributed_type downcast_bf16 dynamo_backend
    dynamo_config enable_cpu_affinity fp16 fp8_config fsdp_config gpu_ids machine_rank main_process_ip
    main_process_port main_training_function megatron_lm_config mixed_precision mpirun_config num_machines
    num_processes parallelism_config rdzv_backend same_network tpu_env tpu_name tpu_use_cluster tpu_use_sudo tpu_vm
    tpu_zone use_cpu
    """
)
# Without the prefix fsdp_, which accelerate adds where it is missing.
ACCELERATE_FSDP = _keys(
    """
    activation_checkpointing activation_checkpointing_offload auto_wrap_policy backward_prefetch
    cpu_ram_efficient_loading forward_prefetch ignored_modules min_num_params offload_params reshard_after_forward
    sharding_strategy state_dict_type sync_module_states transformer_layer_cls_to_wrap use_orig_params version
    """
)
ACCELERATE_DEEPSPEED = _keys(
    """
    deepspeed_config_file deepspeed_exclusion_filter deepspeed_hostfile deepspeed_inclusion_filter
    deepspeed_moe_layer_cls_names deepspeed_multinode_launcher gradient_accumulation_steps gradient_clipping
    offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path
    zero3_init_flag zero3_save_16bit_model zero_stage
    """
)
# With their prefix, which accelerate does not add.
ACCELERATE_PARALLELISM = _keys(
    """
    parallelism_config_cp_backend parallelism_config_cp_comm_strategy parallelism_config_cp_size
    parallelism_config_dp_replicate_size parallelism_config_dp_shard_size parallelism_config_sp_attn_implementation
    parallelism_config_sp_backend parallelism_config_sp_seq_length parallelism_config_sp_seq_length_is_variable
    parallelism_config_sp_size parallelism_config_tp_size
    """
)
ACCELERATE_FP8 = _keys(
    """
    amax_compute_algo amax_history_len backend enable_fsdp_float8_all_gather format interval margin opt_level
    override_linear_precision pad_inner_dim use_autocast_during_eval
    """
)
ACCELERATE_DYNAMO = _keys("backend mode use_dynamic use_fullgraph use_regional_compilation")
DEEPSPEED = _keys(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    inference log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients
    scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """
)
DEEPSPEED_ZERO = _keys(
    """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
    cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
    override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
    prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
    stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
    stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """
)
DEEPSPEED_BF16 = _keys(
    """
    bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update
    """
)
DEEPSPEED_FP16 = _keys(
    """
    auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power loss_scale
    loss_scale_window min_loss_scale
    """
)
DEEPSPEED_OFFLOAD_OPTIMIZER = _keys(
    """
    buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
    super_offload
    """
)
DEEPSPEED_OFFLOAD_PARAM = _keys("buffer_count buffer_size device max_in_cpu nvme_path pin_memory")
AXOLOTL = _keys(
    """
    accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 adapter
    added_tokens_overrides attn_implementation auto_find_batch_size auto_resume_from_checkpoints axolotl_config_path
    base_model base_model_config batch_flattening batch_size bench_dataset bench_split bf16 bfloat16
    bnb_config_kwargs center_rewards_coefficient chat_template chat_template_jinja chat_template_kwargs
    chunked_cross_entropy chunked_cross_entropy_num_chunks cls_model_config comet_api_key comet_experiment_config
    comet_experiment_key comet_mode comet_online comet_project_name comet_workspace context_parallel_size
    cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha curriculum_sampling cut_cross_entropy
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_exact_deduplication dataset_keep_in_memory dataset_num_proc dataset_prepared_path dataset_processes
    dataset_shard_idx dataset_shard_num datasets ddp ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_timeout deepcompile deepspeed default_system_message device device_map dion_lr
    dion_momentum dion_rank_fraction dion_rank_multiple_of do_bench_eval do_causal_lm_eval dp_replicate_size
    dp_shard_size dpo_beta dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss
    dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha
    eaft_k eager_attention early_stopping_patience ebft embedding_lr embedding_lr_scale embeddings_skip_upcast
    eot_tokens eval_batch_size eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len
    eval_steps eval_strategy eval_table_size evals_per_epoch evaluation_strategy excess_length_strategy
    experimental_skip_move_to_device experts_implementation fix_untrained_tokens flash_attention
    flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flex_attention
    flex_attn_compile_kwargs float16 float32 fp16 fp32_norm_classes fp32_norms fp8 fp8_config
    fp8_enable_fsdp_float8_all_gather freeze_mm_modules fsdp fsdp_config fsdp_final_state_dict_type fsdp_version
    fused_attn_kernel gc_collect_steps gc_steps gemma4_hybrid_attn_impl generate_samples generation_do_sample
    generation_max_new_tokens generation_prompt_ratio generation_temperature generation_top_k generation_top_p gptq
    gpu_memory_limit gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    gradio_max_new_tokens gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title
    greater_is_better group_by_length heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id
    hub_revision hub_strategy image_resize_algorithm image_size include_tkps include_tokens_per_second
    is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model
    jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight
    kto_undesirable_weight large_head_attention layer_offloading learning_rate liger_cross_entropy
    liger_fused_linear_cross_entropy liger_glu_activation liger_kernel_impl liger_layer_norm liger_rms_norm
    liger_rms_norm_gated liger_rope liger_swiglu liger_use_token_scaling lisa_layers_attribute lisa_n_layers
    lisa_step_interval llama4_linearized_experts load_best_model_at_end load_in_4bit load_in_8bit local_rank
    logging_steps lora_alpha lora_alpha_pattern lora_dropout lora_embedding_kernel lora_fan_in_fan_out
    lora_mlp_kernel lora_model_dir lora_modules_to_save lora_o_kernel lora_on_cpu lora_qkv_kernel lora_r
    lora_rank_pattern lora_target_linear lora_target_modules lora_target_parameters loraplus_lr_embedding
    loraplus_lr_ratio loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups
    lr_quadratic_warmup lr_scheduler lr_scheduler_kwargs max_grad_norm max_memory max_packed_sequence_len
    max_prompt_len max_steps mean_resizing_embeddings merge_lora merge_method metric_for_best_model micro_batch_size
    min_sample_len mlflow_experiment_name mlflow_run_name mlflow_tracking_uri model_config model_kwargs
    model_quantization_config model_quantization_config_kwargs model_revision model_type multipack_real_batches
    neftune_noise_alpha noisy_embedding_alpha num_dataset_shards_to_save num_epochs num_generation_samples
    num_labels optim_args optim_target_modules optimizer orpo_alpha otel_metrics_host otel_metrics_port output_dir
    overrides_of_model_config overrides_of_model_kwargs pad_to_multiple_of pad_to_sequence_len peft
    peft_autocast_adapter_dtype peft_ensure_weight_tying peft_init_lora_weights peft_layer_replication
    peft_layers_pattern peft_layers_to_transform peft_trainable_token_indices peft_use_dora peft_use_rslora
    ple_cpu_offload plugins pose_max_context_len pose_num_chunks pose_split_on_token_ids precompute_ref_log_probs
    preprocess_iterable pretrain_multipack_attn pretrain_multipack_buffer_size pretraining_dataset
    pretraining_sample_concatenation process_reward_model processor_kwargs processor_type profiler_steps
    profiler_steps_start push_dataset_to_hub qat qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits
    qgalore_proj_group_size qgalore_proj_quant qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale
    qgalore_update_proj_gap qlora_sharded_model_loading quantization quantize_moe_experts ray_num_workers
    ray_run_name reinit_weights relora relora_cpu_offload relora_prune_method relora_prune_ratio
    remove_unused_columns resize_token_embeddings_to_32x resources_per_worker resume_from_checkpoint
    revision_of_model reward_model ring_attn_func rl rl_beta role_boundaries rope_scaling rpo_alpha s2_attention
    sage_attention sample_packing sample_packing_bin_size sample_packing_eff_est sample_packing_group_size
    sample_packing_mp_start_method sample_packing_sequentially save_first_step save_only_model save_safetensors
    save_steps save_strategy save_total_limit saves_per_epoch scaling_softmax scaling_softmax_bias
    scaling_softmax_factor sdp_attention sdpa_varlen seed selective_checkpointing sequence_len
    sequence_parallel_degree shrink_embeddings shuffle_before_merging_datasets shuffle_merged_datasets simpo_gamma
    skip_prepare_dataset special_tokens streaming streaming_multipack_buffer_size strict tensor_parallel_size
    test_datasets tf32 tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy
    tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast tokenizer_use_mistral_common tokens torch_compile
    torch_compile_backend torch_compile_mode torch_compile_options torch_empty_cache_steps torchdistx_path
    total_num_tokens total_supervised_tokens trackio_project_name trackio_run_name trackio_space_id train_on_inputs
    trainer_cls trl trust_remote_code type_of_model unfrozen_parameters use_comet use_eaft use_kernels use_mlflow
    use_onebitllms use_otel_metrics use_pose use_ray use_tensorboard use_trackio use_wandb val_set_size vllm
    wandb_entity wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio
    warmup_steps weight_decay world_size xformers_attention
    """
)
AXOLOTL_ATTENTIONS: Mapping[str, str] = {  # older switches for attn_implementation
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "flex_attention": "flex_attention",
    "sage_attention": "sage",
}
AXOLOTL_FSDP = _keys(
    """
    activation_checkpointing auto_wrap_policy cpu_offload_pin_memory cpu_ram_efficient_loading final_state_dict_type
    fsdp_version min_num_params mixed_precision_policy offload_params reshard_after_forward state_dict_type
    sync_module_states transformer_layer_cls_to_wrap use_orig_params version
    """
)
AXOLOTL_DATASET = _keys(
    """
    chat_template chat_template_jinja conversation data_files drop_system_message ds_type field field_human
    field_messages field_model field_thinking field_tools input_format input_transform length logprobs_field
    message_field_content message_field_role message_field_training message_field_training_detail
    message_property_mappings name path preprocess_shards revision roles roles_to_train shards shards_idx skip split
    split_thinking temperature template_thinking_key text_column train_on_eos train_on_eot trust_remote_code type
    """
)
# The optimizers of transformers, and Axolotl's own.
AXOLOTL_OPTIMIZERS = _keys(
    """
    adafactor adagrad adalomo adamc adamw_8bit adamw_anyprecision adamw_apex_fused adamw_bnb_8bit adamw_torch
    adamw_torch_4bit adamw_torch_8bit adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla ademamix ademamix_8bit
    adopt_adamw ao_adamw_4bit ao_adamw_8bit ao_adamw_fp8 apollo_adamw apollo_adamw_layerwise came_pytorch dion
    flash_adam flash_adamw flash_lion flash_sgd flash_sgdw galore_adafactor galore_adafactor_layerwise galore_adamw
    galore_adamw_8bit galore_adamw_8bit_layerwise galore_adamw_layerwise grokadamw lion_32bit lion_8bit lomo muon
    optimi_adamw paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit
    paged_lion_8bit polora q_galore_adamw8bit rmsprop rmsprop_bnb rmsprop_bnb_32bit rmsprop_bnb_8bit
    schedule_free_adamw schedule_free_radam schedule_free_sgd sgd sinkgd stable_adamw
    """
)
# ``SFTConfig``, ``ModelConfig`` and ``ScriptArguments`` of TRL, whose parser passes every other key on to the launcher.
TRL = _keys(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs activation_offloading adam_beta1
    adam_beta2 adam_epsilon assistant_only_loss attn_implementation auto_find_batch_size
    average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval bnb_4bit_quant_storage bnb_4bit_quant_type
    chat_template_path completion_only_loss data_seed dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor dataset_config dataset_kwargs dataset_name dataset_num_proc dataset_streaming
    dataset_test_split dataset_text_field dataset_train_split datasets ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train dtype enable_jit_checkpoint eos_token eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_on_start eval_packing eval_steps eval_strategy eval_use_gather_object fp16
    fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token ignore_bias_buffers ignore_data_skip include_for_metrics include_num_input_tokens_seen
    label_names label_smoothing_factor learning_rate length_column_name liger_kernel_config load_best_model_at_end
    load_in_4bit load_in_8bit local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lora_alpha lora_dropout lora_modules_to_save lora_r
    lora_target_modules lora_target_parameters lora_task_type loss_type lr_scheduler_kwargs lr_scheduler_type
    max_grad_norm max_length max_steps metric_for_best_model model_init_kwargs model_name_or_path model_revision
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir packing packing_strategy
    pad_to_multiple_of pad_token padding_free parallelism_config per_device_eval_batch_size
    per_device_train_batch_size prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint router_aux_loss_coef run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset skip_memory_metrics streaming
    test_split_size tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy truncation_mode
    trust_remote_code use_bnb_nested_quant use_cache use_cpu use_dora use_liger_kernel use_peft use_rslora
    warmup_steps weight_decay
    """
)
# Of ``accelerate launch``, and TRL's own.
TRL_LAUNCH = _keys(
    "accelerate_config env num_machines num_processes main_process_port machine_rank mixed_precision gpu_ids"
)
