"""ComfyUI nodes: thin adapters over `training`. Each module holds the schemas of one topic."""

from comfy_api.latest import ComfyExtension

from .blend import RetuneBlendConditioning, RetuneBlendTextEncoders, RetuneStepWindow
from .compare import RetuneCompareGrid
from .dataset import RetuneDatasetFromImages, RetuneJoinDatasets, RetuneLoadDataset
from .demo import RetuneDemoDataset, RetuneLoadDemoModel
from .embedding import RetuneLoadEmbedding, RetuneSaveEmbedding
from .export import RetuneExportDiffusers
from .lora import RetuneApplyLora
from .reset import RetuneResetAttention
from .reward import RetuneCombineRewards, RetuneDiversity, RetuneLoadReward, RetuneScoreImages
from .reward_tune import RetuneRewardTune
from .run_chart import RetuneRunChart
from .save_lora import RetuneSaveLora
from .saved_text_encoder import RetuneLoadTextEncoder, RetuneSaveTextEncoder
from .scale import RetuneScaleConditioning, RetuneScaleTextEncoder
from .settings import RetuneSamplePrompts, RetuneTrainingSettings
from .text_encoder import RetuneFitProjection, RetuneLoadT5
from .train import RetuneTrainModel
from .train_embedding import RetuneTrainEmbedding
from .train_lora import RetuneTrainLora
from .train_lora_from_folder import RetuneTrainLoraFromFolder
from .vae import RetuneSwapVAE


class RetuneExtension(ComfyExtension):
    async def on_load(self):
        from .ui.routes import register

        register()

    async def get_node_list(self):
        from .ui.net import guarded

        nodes = [
            RetuneLoadDemoModel,
            RetuneDemoDataset,
            RetuneLoadT5,
            RetuneFitProjection,
            RetuneScaleTextEncoder,
            RetuneScaleConditioning,
            RetuneSaveTextEncoder,
            RetuneLoadTextEncoder,
            RetuneExportDiffusers,
            RetuneResetAttention,
            RetuneSwapVAE,
            RetuneLoadDataset,
            RetuneDatasetFromImages,
            RetuneTrainingSettings,
            RetuneSamplePrompts,
            RetuneTrainModel,
            RetuneRunChart,
            RetuneApplyLora,
            RetuneTrainLora,
            RetuneJoinDatasets,
            RetuneSaveLora,
            RetuneTrainEmbedding,
            RetuneRewardTune,
            RetuneLoadEmbedding,
            RetuneSaveEmbedding,
            RetuneLoadReward,
            RetuneCombineRewards,
            RetuneScoreImages,
            RetuneDiversity,
            RetuneBlendTextEncoders,
            RetuneBlendConditioning,
            RetuneStepWindow,
            RetuneCompareGrid,
            RetuneTrainLoraFromFolder,
        ]
        return [guarded(node) for node in nodes]
