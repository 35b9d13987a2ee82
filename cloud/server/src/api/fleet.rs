//! Routes of the server itself, devices, enrolment and the audit.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::blocking;
use super::types::{
    AdvanceRequest, AuditView, DeviceView, EnrollReply, EnrollRequest, ErrorBody, Info, TagRequest,
    TokenReply, TokenRequest,
};
use crate::cloud::Cloud;
use crate::service::Fault;

type Shared = State<Arc<Cloud>>;

/// Routes that need the token.
pub fn routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new()
        .routes(routes!(info))
        .routes(routes!(token))
        .routes(routes!(devices))
        .routes(routes!(device))
        .routes(routes!(revoke))
        .routes(routes!(tag))
        .routes(routes!(lockstep))
        .routes(routes!(audit))
}

/// Routes with an authority of their own.
pub fn open_routes() -> OpenApiRouter<Arc<Cloud>> {
    OpenApiRouter::new().routes(routes!(enroll))
}

/// What the server is and where devices connect.
#[utoipa::path(get, path = "/v1/info", responses((status = 200, body = Info)), tag = "fleet")]
async fn info(State(cloud): Shared) -> Json<Info> {
    Json(cloud.info())
}

/// Makes a one-time token with which one device enrols.
#[utoipa::path(post, path = "/v1/devices/tokens", request_body = TokenRequest, responses((status = 200, body = TokenReply), (status = 400, body = ErrorBody)), tag = "fleet")]
async fn token(
    State(cloud): Shared,
    Json(request): Json<TokenRequest>,
) -> Result<Json<TokenReply>, Fault> {
    blocking(move || cloud.make_token(&request)).await
}

/// Enrols a device: the enrolment token in the body is the authority.
#[utoipa::path(post, path = "/v1/enroll", request_body = EnrollRequest, responses((status = 200, body = EnrollReply), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)), security(()), tag = "fleet")]
async fn enroll(
    State(cloud): Shared,
    Json(request): Json<EnrollRequest>,
) -> Result<Json<EnrollReply>, Fault> {
    blocking(move || cloud.enroll(&request)).await
}

/// All devices.
#[utoipa::path(get, path = "/v1/devices", responses((status = 200, body = Vec<DeviceView>)), tag = "fleet")]
async fn devices(State(cloud): Shared) -> Result<Json<Vec<DeviceView>>, Fault> {
    blocking(move || cloud.devices()).await
}

/// One device.
#[utoipa::path(get, path = "/v1/devices/{id}", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = DeviceView), (status = 404, body = ErrorBody)), tag = "fleet")]
async fn device(State(cloud): Shared, Path(id): Path<String>) -> Result<Json<DeviceView>, Fault> {
    blocking(move || cloud.device(&id)).await
}

/// Refuses a device from now on, on both transports.
#[utoipa::path(post, path = "/v1/devices/{id}/revoke", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = DeviceView), (status = 404, body = ErrorBody)), tag = "fleet")]
async fn revoke(State(cloud): Shared, Path(id): Path<String>) -> Result<Json<DeviceView>, Fault> {
    blocking(move || cloud.revoke(&id)).await
}

/// Tags a device with labels, or moves it to another group; rollouts choose devices by them.
#[utoipa::path(post, path = "/v1/devices/{id}/tags", params(("id" = String, Path, description = "Its id")), request_body = TagRequest, responses((status = 200, body = DeviceView), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)), tag = "fleet")]
async fn tag(
    State(cloud): Shared,
    Path(id): Path<String>,
    Json(request): Json<TagRequest>,
) -> Result<Json<DeviceView>, Fault> {
    blocking(move || cloud.tag(&id, &request)).await
}

/// Lets replayed sources (simulators, data sets) run on; live cameras take no notice.
#[utoipa::path(post, path = "/v1/lockstep", request_body = AdvanceRequest, responses((status = 200, body = AdvanceRequest)), tag = "fleet")]
async fn lockstep(
    State(cloud): Shared,
    Json(request): Json<AdvanceRequest>,
) -> Result<Json<AdvanceRequest>, Fault> {
    blocking(move || {
        cloud.advance(request.run_until)?;
        Ok(request)
    })
    .await
}

/// The conservation law over the fleet: flagged = ingested + spooled + dropped.
#[utoipa::path(get, path = "/v1/audit", responses((status = 200, body = AuditView)), tag = "fleet")]
async fn audit(State(cloud): Shared) -> Result<Json<AuditView>, Fault> {
    blocking(move || cloud.audit()).await
}
