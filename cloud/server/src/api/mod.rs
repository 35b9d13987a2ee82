//! The HTTP API: routes, authorisation and the mapping of faults to statuses. Handlers only
//! translate; the services decide.
//!
//! Everything under `/v1` needs the server's token, but for enrolment, which has its own. The
//! API describes itself at `/openapi.json`.

mod fleet;
mod keys;
mod models;
mod queue;
mod rollouts;
pub mod types;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;

use crate::cloud::Cloud;
use crate::service::Fault;
use types::ErrorBody;

/// Longest that an answer is held back for a change.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Largest picture file of an import in bytes.
const MAX_PICTURE: usize = 32 * 1024 * 1024;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Flywheel",
        description = "A data engine for machines that see: ingest, labelling queue, datasets, training, evaluation, registry and rollouts."
    ),
    modifiers(&Token),
    security(("token" = []))
)]
struct Doc;

struct Token;

impl utoipa::Modify for Token {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_with(Default::default);
        components.add_security_scheme(
            "token",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
    }
}

/// The API over a cloud.
pub fn router(cloud: Arc<Cloud>) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Doc::openapi())
        .merge(fleet::routes())
        .merge(queue::routes())
        .merge(models::routes())
        .merge(rollouts::routes())
        .merge(keys::routes())
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&cloud),
            authorise,
        ))
        .merge(fleet::open_routes())
        .split_for_parts();
    let document = Arc::new(document);
    router
        .route(
            "/openapi.json",
            axum::routing::get(move || {
                let document = Arc::clone(&document);
                async move { Json(&*document).into_response() }
            }),
        )
        .layer(axum::extract::DefaultBodyLimit::max(MAX_PICTURE))
        .with_state(cloud)
}

async fn authorise(State(cloud): State<Arc<Cloud>>, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    if same(given.as_bytes(), cloud.token.as_bytes()) {
        next.run(request).await
    } else {
        (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, "Bearer")],
            Json(ErrorBody {
                error: "the token is missing or wrong; send `Authorization: Bearer TOKEN` with the token from the server's data folder".to_owned(),
            }),
        )
            .into_response()
    }
}

/// Compares digests, so that the time it takes says nothing about how much of a guess is right.
fn same(a: &[u8], b: &[u8]) -> bool {
    use flywheel_shared::ids::Digest;
    Digest::of(a) == Digest::of(b)
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Damaged(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Internal(_) => {
                tracing::error!(fault = %self, "a request failed");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        (
            status,
            Json(ErrorBody {
                error: self.to_string(),
            }),
        )
            .into_response()
    }
}

/// Runs work that waits for the disk or the processor off the threads that serve sockets.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<Json<T>, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map(Json),
        Err(error) => Err(Fault::Internal(format!(
            "the request was cut short: {error}"
        ))),
    }
}
