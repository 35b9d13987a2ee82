//! Routes of rollouts and their log.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::types::{ActRequest, ErrorBody, PlanView, RolloutAction, RolloutRequest, RolloutView};
use super::{MAX_WAIT, blocking};
use crate::cloud::Cloud;
use crate::service::rollouts::log::Line;
use crate::service::{Fault, now_ms};

type Shared = State<Arc<Cloud>>;

/// Most lines of the log in one answer.
const MAX_LINES: usize = 1000;

pub fn routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new()
        .routes(routes!(start, rollouts))
        .routes(routes!(plan))
        .routes(routes!(log))
        .routes(routes!(rollout))
        .routes(routes!(act))
}

/// Starts a rollout.
#[utoipa::path(post, path = "/v1/rollouts", request_body = RolloutRequest, responses((status = 200, body = RolloutView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "rollouts")]
async fn start(
    State(cloud): Shared,
    Json(request): Json<RolloutRequest>,
) -> Result<Json<RolloutView>, Fault> {
    blocking(move || {
        let inventory = cloud.inventory();
        let view = cloud.rollouts.start(&request, &inventory, now_ms())?;
        cloud.advance_rollouts()?;
        Ok(view)
    })
    .await
}

/// What a rollout would do; nothing is done.
#[utoipa::path(post, path = "/v1/rollouts/plan", request_body = RolloutRequest, responses((status = 200, body = PlanView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "rollouts")]
async fn plan(
    State(cloud): Shared,
    Json(request): Json<RolloutRequest>,
) -> Result<Json<PlanView>, Fault> {
    blocking(move || {
        cloud
            .rollouts
            .preview(&request, &cloud.inventory(), now_ms())
    })
    .await
}

/// Rollouts, oldest first, without their devices.
#[utoipa::path(get, path = "/v1/rollouts", responses((status = 200, body = Vec<RolloutView>)), tag = "rollouts")]
async fn rollouts(State(cloud): Shared) -> Result<Json<Vec<RolloutView>>, Fault> {
    blocking(move || Ok(cloud.rollouts.list(&cloud.inventory(), now_ms()))).await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct ViewQuery {
    /// Hold the answer back until something changes, for so many milliseconds at most.
    wait_ms: Option<u64>,
    /// Leave the single devices out.
    brief: Option<bool>,
}

/// One rollout.
#[utoipa::path(get, path = "/v1/rollouts/{id}", params(("id" = String, Path, description = "Its number, or `latest`"), ViewQuery), responses((status = 200, body = RolloutView), (status = 404, body = ErrorBody)), tag = "rollouts")]
async fn rollout(
    State(cloud): Shared,
    Path(id): Path<String>,
    Query(query): Query<ViewQuery>,
) -> Result<Json<RolloutView>, Fault> {
    if let Some(wait_ms) = query.wait_ms.filter(|wait| *wait > 0) {
        let mut changes = cloud.rollouts.changes();
        changes.mark_unchanged();
        let limit = Duration::from_millis(wait_ms).min(MAX_WAIT);
        let _elapsed = tokio::time::timeout(limit, changes.changed()).await;
    }
    let devices = !query.brief.unwrap_or(false);
    blocking(move || {
        cloud
            .rollouts
            .view(&id, &cloud.inventory(), now_ms(), devices)
    })
    .await
}

/// Pauses, resumes or aborts a rollout, excludes a device, or forces the next wave or a device.
#[utoipa::path(post, path = "/v1/rollouts/{id}/{action}", params(("id" = String, Path, description = "Its number, or `latest`"), ("action" = RolloutAction, Path, description = "What to do")), request_body = ActRequest, responses((status = 200, body = RolloutView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "rollouts")]
async fn act(
    State(cloud): Shared,
    Path((id, action)): Path<(String, RolloutAction)>,
    Json(request): Json<ActRequest>,
) -> Result<Json<RolloutView>, Fault> {
    blocking(move || {
        let inventory = cloud.inventory();
        let view = cloud
            .rollouts
            .act(&id, action, &request, &inventory, now_ms())?;
        cloud.advance_rollouts()?;
        Ok(view)
    })
    .await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct LogQuery {
    /// Number of the first line; 0 if absent.
    from: Option<u64>,
    /// Most lines; 1,000 at most.
    limit: Option<usize>,
}

/// Lines of the rollout log, which is append-only, chained by digest and signed.
#[utoipa::path(get, path = "/v1/rollouts/log", params(LogQuery), responses((status = 200, body = Vec<Line>)), tag = "rollouts")]
async fn log(
    State(cloud): Shared,
    Query(query): Query<LogQuery>,
) -> Result<Json<Vec<Line>>, Fault> {
    let limit = query.limit.unwrap_or(MAX_LINES).min(MAX_LINES);
    blocking(move || cloud.rollouts.log(query.from.unwrap_or(0), limit)).await
}
