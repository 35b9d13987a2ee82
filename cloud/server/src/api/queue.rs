//! Routes of the labelling queue, its pictures, and datasets.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use flywheel_shared::ids::Digest;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::blocking;
use super::types::{
    DatasetDiff, DatasetView, ErrorBody, FreezeRequest, ImportQuery, ItemView, LabelRequest,
    NextRequest, PSEUDO_ABOVE, QueueItem, QueueStats, SkipRequest,
};
use crate::cloud::Cloud;
use crate::service::Fault;

type Shared = State<Arc<Cloud>>;

pub fn routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(next))
        .routes(routes!(label))
        .routes(routes!(skip))
        .routes(routes!(stats))
        .routes(routes!(item))
        .routes(routes!(picture))
        .routes(routes!(import))
        .routes(routes!(freeze, datasets))
        .routes(routes!(dataset))
        .routes(routes!(diff))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Only items in this state: pending, leased, labelled or skipped.
    state: Option<String>,
    /// At most so many; 100 if absent.
    limit: Option<usize>,
}

/// Items in the order in which they are handed out.
#[utoipa::path(get, path = "/v1/queue", params(ListQuery), responses((status = 200, body = Vec<QueueItem>)), tag = "queue")]
async fn list(
    State(cloud): Shared,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<QueueItem>>, Fault> {
    blocking(move || {
        cloud
            .labelling
            .list(query.state.as_deref(), query.limit.unwrap_or(100))
    })
    .await
}

/// Leases the next items.
#[utoipa::path(post, path = "/v1/queue/next", request_body = NextRequest, responses((status = 200, body = Vec<QueueItem>)), tag = "queue")]
async fn next(
    State(cloud): Shared,
    Json(request): Json<NextRequest>,
) -> Result<Json<Vec<QueueItem>>, Fault> {
    blocking(move || {
        cloud
            .labelling
            .next(&request, &cloud.registry, &cloud.catalog)
    })
    .await
}

/// Labels a leased item.
#[utoipa::path(post, path = "/v1/queue/label", request_body = LabelRequest, responses((status = 200, body = QueueItem), (status = 409, body = ErrorBody)), tag = "queue")]
async fn label(
    State(cloud): Shared,
    Json(request): Json<LabelRequest>,
) -> Result<Json<QueueItem>, Fault> {
    blocking(move || cloud.labelling.label(&request)).await
}

/// Puts a leased item aside.
#[utoipa::path(post, path = "/v1/queue/skip", request_body = SkipRequest, responses((status = 200, body = QueueItem), (status = 409, body = ErrorBody)), tag = "queue")]
async fn skip(
    State(cloud): Shared,
    Json(request): Json<SkipRequest>,
) -> Result<Json<QueueItem>, Fault> {
    blocking(move || cloud.labelling.skip(&request)).await
}

/// The queue in numbers.
#[utoipa::path(get, path = "/v1/queue/stats", responses((status = 200, body = QueueStats)), tag = "queue")]
async fn stats(State(cloud): Shared) -> Result<Json<QueueStats>, Fault> {
    blocking(move || cloud.labelling.stats(&cloud.registry, &cloud.catalog)).await
}

/// One item.
#[utoipa::path(get, path = "/v1/queue/{item}", params(("item" = u64, Path, description = "Number of the item")), responses((status = 200, body = QueueItem), (status = 404, body = ErrorBody)), tag = "queue")]
async fn item(State(cloud): Shared, Path(item): Path<u64>) -> Result<Json<QueueItem>, Fault> {
    blocking(move || cloud.labelling.item(item)).await
}

/// A picture as PNG.
#[utoipa::path(get, path = "/v1/pictures/{digest}", params(("digest" = String, Path, description = "SHA-256 of the stored bytes")), responses((status = 200, content_type = "image/png"), (status = 404, body = ErrorBody), (status = 422, body = ErrorBody)), tag = "queue")]
async fn picture(State(cloud): Shared, Path(digest): Path<String>) -> Result<Response, Fault> {
    let Json(png) = blocking(move || {
        let digest: Digest = digest
            .parse()
            .map_err(|error| Fault::Invalid(format!("{digest}: {error}")))?;
        Ok(cloud.stations().picture(&digest)?.to_png()?)
    })
    .await?;
    // The name is the content's digest, so what is cached never goes stale.
    Ok((
        [
            (header::CONTENT_TYPE, "image/png"),
            (
                header::CACHE_CONTROL,
                "private, max-age=31536000, immutable",
            ),
        ],
        png,
    )
        .into_response())
}

/// Imports a labelled picture; the body is a PNG, JPEG, BMP or PPM file.
#[utoipa::path(put, path = "/v1/items", params(ImportQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 200, body = ItemView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "datasets")]
async fn import(
    State(cloud): Shared,
    Query(query): Query<ImportQuery>,
    body: Bytes,
) -> Result<Json<ItemView>, Fault> {
    blocking(move || cloud.catalog.import(&query, &body)).await
}

/// Freezes everything labelled now into an immutable version.
#[utoipa::path(post, path = "/v1/datasets", request_body = FreezeRequest, responses((status = 200, body = DatasetView)), tag = "datasets")]
async fn freeze(
    State(cloud): Shared,
    Json(request): Json<FreezeRequest>,
) -> Result<Json<DatasetView>, Fault> {
    blocking(move || {
        let above = request.pseudo_above.unwrap_or(PSEUDO_ABOVE);
        let pseudo = cloud
            .labelling
            .pseudo_labels(&cloud.registry, &cloud.catalog, above)?;
        let labels = cloud.labelling.labels();
        cloud
            .catalog
            .freeze(&labels, &pseudo, request.seed.unwrap_or(0))
    })
    .await
}

/// Dataset versions, oldest first.
#[utoipa::path(get, path = "/v1/datasets", responses((status = 200, body = Vec<DatasetView>)), tag = "datasets")]
async fn datasets(State(cloud): Shared) -> Result<Json<Vec<DatasetView>>, Fault> {
    blocking(move || cloud.catalog.list()).await
}

/// One dataset version.
#[utoipa::path(get, path = "/v1/datasets/{id}", params(("id" = String, Path, description = "Its id or the beginning of it")), responses((status = 200, body = DatasetView), (status = 404, body = ErrorBody)), tag = "datasets")]
async fn dataset(State(cloud): Shared, Path(id): Path<String>) -> Result<Json<DatasetView>, Fault> {
    blocking(move || {
        let (id, manifest) = cloud.catalog.find(&id)?;
        cloud.catalog.view(&id, &manifest)
    })
    .await
}

/// What changed between two versions.
#[utoipa::path(get, path = "/v1/datasets/{from}/diff/{to}", params(("from" = String, Path, description = "The first"), ("to" = String, Path, description = "The second")), responses((status = 200, body = DatasetDiff), (status = 404, body = ErrorBody)), tag = "datasets")]
async fn diff(
    State(cloud): Shared,
    Path((from, to)): Path<(String, String)>,
) -> Result<Json<DatasetDiff>, Fault> {
    blocking(move || cloud.catalog.diff(&from, &to)).await
}
