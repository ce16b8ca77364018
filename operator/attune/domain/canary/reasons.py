"""The reasons that only a Canary gives, in its conditions and Events."""

from typing import Final

from attune.domain.verdict import REASON_NO_DATA, REASON_NOT_ENOUGH

INITIALIZING: Final = "Initializing"
HEALTHY: Final = "Healthy"
ROLLOUT_PROGRESSING: Final = "RolloutProgressing"
PROMOTING: Final = "Promoting"
PROMOTION_GIVEN_UP: Final = "PromotionGivenUp"
STABLE_NOT_READY: Final = "StableNotReady"
CANARY_NOT_READY: Final = "CanaryNotReady"
ANALYSIS_TIMED_OUT: Final = "AnalysisTimedOut"
NO_DATA: Final = REASON_NO_DATA
NOT_ENOUGH_EVIDENCE: Final = REASON_NOT_ENOUGH
GOLDEN_SET_TOO_SMALL: Final = "GoldenSetTooSmall"
GATEWAY_NOT_FOUND: Final = "GatewayNotFound"
GATEWAY_NOT_READY: Final = "GatewayNotReady"
ROUTE_NOT_ACCEPTED: Final = "RouteNotAccepted"
