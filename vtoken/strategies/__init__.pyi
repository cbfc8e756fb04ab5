"""Reduction strategies, one file each. Importing the package registers every one of them."""

# written by docs/generate_stub.py
from .assembly import combine as combine
from .base import Strategy as Strategy, top_k as top_k
from .composition import Composite as Composite
from .info import StrategyInfo as StrategyInfo
from .merging import EncoderStrategy as EncoderStrategy, ScheduledMerging as ScheduledMerging
from .registry import create as create, list_names as list_names, register as register, registered as registered, strategy_info as strategy_info
from .scored import ScoredStrategy as ScoredStrategy
from .blank_patches import BlankPatches as BlankPatches
from .cdpruner import CDPruner as CDPruner
from .coverage import Coverage as Coverage
from .dart import DART as DART
from .decode_evict import DecodeEvict as DecodeEvict
from .diffrate import DiffRate as DiffRate
from .divprune import DivPrune as DivPrune
from .evs import EVS as EVS
from .farcover import FarCover as FarCover
from .fastv import FastV as FastV
from .flashvid import FlashVID as FlashVID
from .globalcom2 import GlobalCom2 as GlobalCom2
from .hiprune import HiPrune as HiPrune
from .hired import HiRED as HiRED
from .holov import HoloV as HoloV
from .llava_mini import LLaVAMini as LLaVAMini
from .llavolta import LLaVolta as LLaVolta
from .mmtok import MMTok as MMTok
from .mustdrop import MustDrop as MustDrop
from .pool import Pool as Pool
from .prune_by_norm import PruneByNorm as PruneByNorm
from .pvc import PVC as PVC
from .pyramiddrop import PyramidDrop as PyramidDrop
from .quecc import QueCC as QueCC
from .random import Random as Random
from .random_merge import RandomMerge as RandomMerge
from .scope import SCOPE as SCOPE
from .sink_window import SinkWindow as SinkWindow
from .sparsevlm import SparseVLM as SparseVLM
from .stc import STC as STC
from .stc_cacher import STCCacher as STCCacher
from .stc_pruner import STCPruner as STCPruner
from .still_patches import StillPatches as StillPatches
from .tempme import TempMe as TempMe
from .token_corr import TokenCorr as TokenCorr
from .tome import ToMe as ToMe
from .ts_llava import TSLLaVA as TSLLaVA
from .uniform import Uniform as Uniform
from .v_cast import VCAST as VCAST
from .vidcom2 import VidCom2 as VidCom2
from .vidkv import VidKV as VidKV
from .visionzip import VisionZip as VisionZip
from .vispruner import VisPruner as VisPruner
from .voco import VoCo as VoCo
from .vtc_cls import VTCCLS as VTCCLS
from .zipvl import ZipVL as ZipVL
