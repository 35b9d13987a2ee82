//! Routes of jobs and models.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::types::{
    AddRequest, BlobView, ErrorBody, EvalRequest, JobView, ManifestView, ModelView, PromoteRequest,
    TrainRequest,
};
use super::{MAX_WAIT, blocking};
use crate::cloud::Cloud;
use crate::service::Fault;
use crate::service::jobs::Jobs;

type Shared = State<Arc<Cloud>>;

/// Largest part of a model in bytes.
const MAX_PART: usize = 256 * 1024 * 1024;

pub fn routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new()
        .routes(routes!(train))
        .routes(routes!(eval))
        .routes(routes!(job))
        .routes(routes!(add, models))
        .routes(routes!(model))
        .routes(routes!(manifest))
        .routes(routes!(promote))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(blob))
                .layer(DefaultBodyLimit::max(MAX_PART)),
        )
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    /// Hold the answer back until something changes, for so many milliseconds at most.
    wait_ms: Option<u64>,
}

impl WaitQuery {
    fn limit(&self) -> Duration {
        Duration::from_millis(self.wait_ms.unwrap_or(0)).min(MAX_WAIT)
    }
}

/// Trains a candidate; answers at once with the job.
#[utoipa::path(post, path = "/v1/train", request_body = TrainRequest, responses((status = 200, body = JobView), (status = 404, body = ErrorBody)), tag = "models")]
async fn train(
    State(cloud): Shared,
    Json(request): Json<TrainRequest>,
) -> Result<Json<JobView>, Fault> {
    blocking(move || Jobs::train(&cloud, request)).await
}

/// Judges a model on the golden set; answers at once with the job.
#[utoipa::path(post, path = "/v1/eval", request_body = EvalRequest, responses((status = 200, body = JobView), (status = 404, body = ErrorBody)), tag = "models")]
async fn eval(
    State(cloud): Shared,
    Json(request): Json<EvalRequest>,
) -> Result<Json<JobView>, Fault> {
    blocking(move || Jobs::eval(&cloud, request)).await
}

/// A job.
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = String, Path, description = "Its id"), WaitQuery), responses((status = 200, body = JobView), (status = 404, body = ErrorBody)), tag = "models")]
async fn job(
    State(cloud): Shared,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Result<Json<JobView>, Fault> {
    if let Some(mut ended) = cloud.jobs.changes(&id) {
        // Steps come many a second; the end of the job closes the channel.
        let closed = async { while ended.changed().await.is_ok() {} };
        let _elapsed = tokio::time::timeout(query.limit(), closed).await;
    }
    blocking(move || cloud.jobs.view(&id)).await
}

/// Stores a part of a model; the body is its bytes.
#[utoipa::path(put, path = "/v1/blobs", request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 200, body = BlobView)), tag = "models")]
async fn blob(State(cloud): Shared, body: Bytes) -> Result<Json<BlobView>, Fault> {
    blocking(move || {
        Ok(BlobView {
            digest: cloud.store.blobs().put(&body)?.to_string(),
        })
    })
    .await
}

/// Registers a model that was made elsewhere, after it has given its golden answers here.
#[utoipa::path(post, path = "/v1/models", request_body = AddRequest, responses((status = 200, body = ModelView), (status = 400, body = ErrorBody)), tag = "models")]
async fn add(
    State(cloud): Shared,
    Json(request): Json<AddRequest>,
) -> Result<Json<ModelView>, Fault> {
    blocking(move || cloud.registry.view(&cloud.stations().add(&request)?)).await
}

/// Models, oldest first.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = Vec<ModelView>)), tag = "models")]
async fn models(State(cloud): Shared) -> Result<Json<Vec<ModelView>>, Fault> {
    blocking(move || {
        cloud
            .registry
            .list()?
            .iter()
            .map(|model| cloud.registry.view(model))
            .collect()
    })
    .await
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", params(("id" = String, Path, description = "Its id, the beginning of it, or `champion`")), responses((status = 200, body = ModelView), (status = 404, body = ErrorBody)), tag = "models")]
async fn model(State(cloud): Shared, Path(id): Path<String>) -> Result<Json<ModelView>, Fault> {
    blocking(move || cloud.registry.view(&cloud.registry.find(&id)?)).await
}

/// The bytes that the release key must sign to promote a model.
#[utoipa::path(get, path = "/v1/models/{id}/manifest", params(("id" = String, Path, description = "Its id or the beginning of it")), responses((status = 200, body = ManifestView), (status = 404, body = ErrorBody)), tag = "models")]
async fn manifest(
    State(cloud): Shared,
    Path(id): Path<String>,
) -> Result<Json<ManifestView>, Fault> {
    blocking(move || cloud.registry.manifest(&cloud.registry.find(&id)?)).await
}

/// Makes a model the champion, with the release key's signature.
#[utoipa::path(post, path = "/v1/models/{id}/promote", params(("id" = String, Path, description = "Its id or the beginning of it")), request_body = PromoteRequest, responses((status = 200, body = ModelView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "models")]
async fn promote(
    State(cloud): Shared,
    Path(id): Path<String>,
    Json(request): Json<PromoteRequest>,
) -> Result<Json<ModelView>, Fault> {
    blocking(move || {
        let model = cloud.registry.promote(&id, &request)?;
        cloud.registry.view(&model)
    })
    .await
}
