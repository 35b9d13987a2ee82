//! Routes of the trust roots. Nothing secret passes here: a root is signed elsewhere.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::blocking;
use super::types::{ErrorBody, RootRequest, RootView};
use crate::cloud::Cloud;
use crate::service::Fault;

type Shared = State<Arc<Cloud>>;

pub fn routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new().routes(routes!(roots, publish))
}

/// Every version of the trust root, oldest first.
#[utoipa::path(get, path = "/v1/roots", responses((status = 200, body = Vec<RootView>)), tag = "keys")]
async fn roots(State(cloud): Shared) -> Result<Json<Vec<RootView>>, Fault> {
    blocking(move || cloud.roots.list()).await
}

/// Takes the next version of the trust root and hands it to the devices.
#[utoipa::path(post, path = "/v1/roots", request_body = RootRequest, responses((status = 200, body = RootView), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), tag = "keys")]
async fn publish(
    State(cloud): Shared,
    Json(request): Json<RootRequest>,
) -> Result<Json<RootView>, Fault> {
    blocking(move || cloud.publish_root(&request)).await
}
