"""Which models each engine knows by name: lists taken from the releases in ``table.py``.

vLLM's and SGLang's names are those of ``architectures`` in config.json (models that generate, and
CLIP); GPTQModel's and TGI's are of ``model_type``. An engine that does not know a name may still
run it in another way, so that a name which is missing here is never more than a warning.
"""

from __future__ import annotations

# vllm/model_executor/models/registry.py (a test compares it with the installed vLLM), and
# `EntryClass` of the files in sglang/srt/models.
_VLLM_AND_SGLANG = """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BailingMoeForCausalLM
    BailingMoeV2_5ForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration ChatGLMModel CLIPModel Cohere2ForCausalLM
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereForCausalLM
    Cosmos3EdgeForConditionalGeneration Cosmos3ForConditionalGeneration DbrxForCausalLM
    DeciLMForCausalLM DeepseekForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
    DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM DotsOCRForCausalLM
    Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM
    ExaoneForCausalLM ExaoneMoEForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
    Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
    GlmAsrForConditionalGeneration GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration
    GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GptOssForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM
    GraniteMoeSWAForCausalLM GraniteSWAForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HYV3ForCausalLM HYV4ForCausalLM InklingForConditionalGeneration
    InternLM2ForCausalLM InternLM3ForCausalLM InternS1ForConditionalGeneration
    InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration InternVLChatModel IQuestCoderForCausalLM
    IQuestLoopCoderForCausalLM K2HorizonForCausalLM KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiLinearForCausalLM KimiVLForConditionalGeneration
    LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration
    LightOnOCRForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration
    LlamaForCausalLM LlavaForConditionalGeneration LongcatFlashForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MellumForCausalLM MiDashengLMModel MiMoForCausalLM MiMoV2FlashForCausalLM
    MiMoV2ForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM MiniCPMO MiniCPMV
    MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MistralLarge3ForCausalLM
    MixtralForCausalLM MuseGlimmerForCausalLM MuseGlimmerForConditionalGeneration
    NanbeigeForCausalLM NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 NemotronHForCausalLM NemotronHPuzzleForCausalLM Olmo2ForCausalLM
    OlmoeForCausalLM OlmoForCausalLM OPTForCausalLM OrionForCausalLM
    PaddleOCRVLForConditionalGeneration Phi3ForCausalLM Phi4MMForCausalLM PhiForCausalLM
    PhiMoEForCausalLM PixtralForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen3ASRForConditionalGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen4ExpForConditionalGeneration SarvamMLAForCausalLM
    SarvamMoEForCausalLM SolarForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
    Step3p5ForCausalLM Step3p7ForConditionalGeneration Step3VLForConditionalGeneration
    StepVLForConditionalGeneration TeleFLMForCausalLM UnlimitedOCRForCausalLM
    VoxtralForConditionalGeneration WhisperForConditionalGeneration
"""
_VLLM_ONLY = """
    AriaForConditionalGeneration AudioFlamingo3ForConditionalGeneration AXK1ForCausalLM
    BagelForConditionalGeneration BeeForConditionalGeneration Blip2ForConditionalGeneration
    BloomForCausalLM ChatGLMForConditionalGeneration CohereAsrForConditionalGeneration
    CohereCompassForConditionalGeneration CwmForCausalLM DeepseekOCR2ForCausalLM
    DeepseekV41ForCausalLM DeepseekV4ForConditionalGeneration DeepseekVLV2ForCausalLM
    Emu3ForConditionalGeneration Ernie4_5ForCausalLM Exaone4_5_ForConditionalGeneration
    FalconForCausalLM FireRedASR2ForConditionalGeneration FlexOlmoForCausalLM
    FunASRForConditionalGeneration FunAudioChatForConditionalGeneration GLM4VForCausalLM
    Glm5NextForCausalLM GlmForCausalLM GPTNeoXForCausalLM Granite4VisionForConditionalGeneration
    GraniteSpeechForConditionalGeneration GraniteSpeechPlusForConditionalGeneration
    H2OVLChatModel HCXVisionV2ForCausalLM HfMoondream HunYuanVLForConditionalGeneration
    HyperCLOVAXForCausalLM Idefics3ForConditionalGeneration InklingForCausalLM
    InternVLForConditionalGeneration IsaacForConditionalGeneration Jais2ForCausalLM
    JambaForCausalLM KananaVForConditionalGeneration KeyeForConditionalGeneration
    KeyeVL1_5ForConditionalGeneration Llama_Nemotron_Nano_VL LLaMAForCausalLM
    LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration
    LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LongcatFlashNgramForCausalLM MiMoV2OmniForCausalLM Molmo2ForConditionalGeneration
    MolmoForCausalLM Moondream3ForCausalLM MoonshotKimiaForCausalLM MossAudioModel
    MossTranscribeDiarizeForConditionalGeneration NemotronForCausalLM
    NemotronH_Super_Omni_Reasoning_V3 NemotronParseForConditionalGeneration NVLM_D
    Olmo3ForCausalLM OlmoHybridForCausalLM OpenCUAForConditionalGeneration
    OpenPanguVLForConditionalGeneration OpenVLAForActionPrediction Ovis Ovis2_5
    Ovis2_6_MoeForCausalLM Ovis2_6ForCausalLM PaliGemmaForConditionalGeneration
    PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM
    Param2MoEForCausalLM Phi3VForCausalLM Phi4ForCausalLMV Plamo3ForCausalLM
    QianfanOCRForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel
    Qwen3ASRRealtimeGeneration Qwen4ExpForCausalLM RForConditionalGeneration Rnj1ForCausalLM
    SeedOssForCausalLM SkyworkR1VChatModel SmolLM3ForCausalLM SmolVLMForConditionalGeneration
    Step1ForCausalLM Step3TextForCausalLM TeleChat2ForCausalLM TeleChat3ForCausalLM
    UltravoxModel VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration
    VoxtralRealtimeGeneration Zamba2ForCausalLM
"""
_SGLANG_ONLY = """
    BaichuanForCausalLM BailingMM2NativeForConditionalGeneration
    BailingMMNativeForConditionalGeneration BailingMoEForCausalLM BeamForCausalLM
    DeepseekVL2ForCausalLM DFlashLagunaForCausalLM DotsVLMForCausalLM Ernie4_5_ForCausalLM
    GigaChat35ForCausalLM GlmImageForConditionalGeneration Grok1ForCausalLM
    Grok1ModelForCausalLM IQuestQ1ForCausalLM JetNemotronForCausalLM
    JetVLMForConditionalGeneration KimiK3LinearForCausalLM LLaDA2MoeModelLM
    LlavaLlamaForCausalLM LlavaMistralForCausalLM LlavaQwenForCausalLM LlavaVidForCausalLM
    LocateAnythingForConditionalGeneration MiMoV2ASRForCausalLM MiniCPMSALAForCausalLM
    MllamaForConditionalGeneration MossVLForConditionalGeneration MultiModalityCausalLM
    MuseSparkForConditionalGeneration NVILAForConditionalGeneration
    NVILALiteForConditionalGeneration PersimmonForCausalLM Phi3SmallForCausalLM
    POINTSV15ChatModel QWenLMHeadModel Sarashina2VisionForCausalLM SDARForCausalLM
    SDARMoeForCausalLM Spark2_5ForCausalLM XllmForCausalLM XverseForCausalLM
    XverseMoeForCausalLM YiVLForCausalLM ZayaForCausalLM
"""
# gptqmodel/models/auto.py MODEL_MAP (a test compares it with the installed GPTQModel), and what
# `import epmq_gptq` adds.
_GPTQMODEL = """
    afmoe agnes apertus apertus1p5 apertus1p5_text axk2 baichuan bailing_hybrid bailing_moe
    bloom brumby chatglm clip clip_vision_model codegen cohere cohere2 cohere2_moe
    cohere_compass dbrx dbrx_converted deci deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl deepseek_vl_v2 diffusion_gemma dots1 dream ernie4_5 ernie4_5_moe
    ernie4_5_moe_vl ernie4_5_vl_moe exaone exaone4 exaone4_5 exaone4_5_text falcon falcon_h1
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe
    glm4v_moe_text glm5_next glm_moe_dsa glm_ocr glmasr gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_oss gpt_pangu gptj granite granitemoe granitemoehybrid grinmoe hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hunyuan_vl hy_v3 hymba inkling_mm_model instella intern_s2_preview internlm
    internlm2 interns1 internvl internvl_chat jamba k2_horizon kimi_k2 kimi_k25 klear laguna
    lfm2 lfm2_moe lfm2_vl llada2_moe llama llama4 llama4_text llava_qwen2 locateanything
    longcat_flash longllama mage_vl marin mimo mimo_v2 minicpm minicpm3 minicpmo minicpmv
    minicpmv4_6 minimax minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mixtral mllama
    mllama_text_model mobilellm moss mpt muse_glimmer nanbeige nemotron-nas nemotron_h
    nemotron_h_puzzle nemotron_labs_diffusion nemotronh_nano_omni_reasoning_v3 olmo2 olmo3 olmoe
    opt ouro ovis ovis2 ovis2_5 ovis2_6_moe ovis2_6_next phi phi3 phi4mm phimoe qwen qwen2
    qwen2_5_omni qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl
    qwen3_vl_moe qwen4_exp qwen4_exp_text qwen_drive refinedWeb refinedWebModel seed_oss smollm3
    smolvlm solar_open solar_open2 spark2_5 stablelm stablelm_epoch starcoder2 t5 telechat
    unlimited-ocr voxtral xing4_0 xverse yi zamba zamba2 zdtaichu5_0
"""
# server/text_generation_server/models/__init__.py of the last release.
_TGI = """
    baichuan bloom cohere dbrx deepseek_v2 deepseek_v3 falcon gemma gemma2 gemma3 gemma3_text
    gpt2 gpt_bigcode gpt_neox gptj granite idefics2 idefics3 llama llama4 llava_next mistral
    mixtral mllama mpt opt paligemma phi phi3 phimoe qwen2 qwen2_5_vl qwen2_vl RefinedWeb
    RefinedWebModel starcoder2 t5
"""

ARCHITECTURES: dict[str, frozenset[str]] = {
    "vLLM": frozenset((_VLLM_AND_SGLANG + _VLLM_ONLY).split()),
    "SGLang": frozenset((_VLLM_AND_SGLANG + _SGLANG_ONLY).split()),
}
MODEL_TYPES: dict[str, frozenset[str]] = {
    "GPTQModel": frozenset(_GPTQMODEL.split()),
    "TGI": frozenset(_TGI.split()),
}
