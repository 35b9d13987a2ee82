//! The HTTP client of the command line and of the demo: typed calls, and errors that say what to
//! do next.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::api::types::ErrorBody;

/// Address that is tried when none is given.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7878";
/// File in the server's data folder that holds the API token.
pub const TOKEN_FILE: &str = "api-token";
/// File in the server's data folder that holds the API's address.
pub const ADDRESS_FILE: &str = "api-address";

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error(
        "no answer from {server}: {source}; is `flywheel serve` running there, and is --server right?"
    )]
    Unreachable {
        /// Address that was tried.
        server: String,
        /// What the network said.
        source: Box<ureq::Error>,
    },
    /// The token is missing or wrong.
    #[error(
        "{server} does not accept the token; pass --token, set FLYWHEEL_TOKEN, or point --data at the server's data folder"
    )]
    Unauthorized {
        /// Address that answered.
        server: String,
    },
    /// The server said no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's words.
        message: String,
    },
    /// The answer is not what this version expects.
    #[error("{server} answered {path} with something else than expected: {detail}")]
    Protocol {
        /// Address that answered.
        server: String,
        /// Path of the call.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A file that says where the server is can't be read.
    #[error("cannot read {path}: {source}; is `flywheel serve --data` running on that folder?")]
    Discovery {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ClientError {
    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
            || matches!(self, Self::Refused { status, .. } if *status == 503)
    }
}

/// A key by which the server knows a request again that is sent twice.
///
/// # Errors
/// If the system gives no randomness.
pub fn fresh_key() -> anyhow::Result<String> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the system gives no randomness: {error}"))?;
    Ok(hex::encode(bytes))
}

/// A connection to a server's API.
#[derive(Clone)]
pub struct Client {
    server: String,
    token: String,
    agent: ureq::Agent,
    patience: Duration,
}

impl Client {
    /// A client of the API at `server` (`http://host:port`).
    pub fn new(server: &str, token: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_global(Some(Duration::from_secs(120)))
            .build()
            .into();
        Self {
            server: server.trim_end_matches('/').to_owned(),
            token: token.trim().to_owned(),
            agent,
            patience: Duration::ZERO,
        }
    }

    /// A client of the server that runs on a data folder of this machine, with the folder's token
    /// unless another is given.
    ///
    /// # Errors
    /// If the folder does not say where its server listens.
    pub fn from_data(data: &Path, token: Option<&str>) -> Result<Self, ClientError> {
        let read = |name: &str| {
            let path = data.join(name);
            fs::read_to_string(&path).map_err(|source| ClientError::Discovery { path, source })
        };
        let token = match token {
            Some(token) => token.to_owned(),
            None => read(TOKEN_FILE)?,
        };
        Ok(Self::new(read(ADDRESS_FILE)?.trim(), &token))
    }

    /// The same client, which tries again for so long while nobody answers: for callers that
    /// expect the server to come back.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Address of the server.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// `GET path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(path, |client, url| {
            client
                .agent
                .get(url)
                .header("authorization", client.bearer())
                .call()
        })
    }

    /// `GET path` as bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get_bytes(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.call(path, |client, url| {
            client
                .agent
                .get(url)
                .header("authorization", client.bearer())
                .call()
        })
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.json(path, |client, url| {
            client
                .agent
                .post(url)
                .header("authorization", client.bearer())
                .send_json(body)
        })
    }

    /// `PUT path` with a body of bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn put_bytes<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &[u8],
    ) -> Result<T, ClientError> {
        self.json(path, |client, url| {
            client
                .agent
                .put(url)
                .header("authorization", client.bearer())
                .send(body)
        })
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    fn json<T: DeserializeOwned>(
        &self,
        path: &str,
        send: impl Fn(&Self, &str) -> Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<T, ClientError> {
        let bytes = self.call(path, send)?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Protocol {
            server: self.server.clone(),
            path: path.to_owned(),
            detail: error.to_string(),
        })
    }

    fn call(
        &self,
        path: &str,
        send: impl Fn(&Self, &str) -> Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Vec<u8>, ClientError> {
        let url = format!("{}{path}", self.server);
        let started = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let outcome = self.once(path, &url, &send);
            match outcome {
                Err(error) if error.is_transient() && started.elapsed() < self.patience => {
                    // Back-off between tries of a server that is down: there is no event to
                    // wait for on a socket that nobody listens on.
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                other => return other,
            }
        }
    }

    fn once(
        &self,
        path: &str,
        url: &str,
        send: impl Fn(&Self, &str) -> Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Vec<u8>, ClientError> {
        let unreachable = |source: ureq::Error| ClientError::Unreachable {
            server: self.server.clone(),
            source: Box::new(source),
        };
        let mut response = send(self, url).map_err(unreachable)?;
        let status = response.status().as_u16();
        let bytes = response
            .body_mut()
            .with_config()
            .limit(256 * 1024 * 1024)
            .read_to_vec()
            .map_err(unreachable)?;
        match status {
            200..=299 => Ok(bytes),
            401 => Err(ClientError::Unauthorized {
                server: self.server.clone(),
            }),
            _ => Err(ClientError::Refused {
                status,
                message: serde_json::from_slice::<ErrorBody>(&bytes)
                    .map(|body| body.error)
                    .unwrap_or_else(|_| {
                        format!(
                            "{} answered {path} with status {status}: {}",
                            self.server,
                            String::from_utf8_lossy(&bytes)
                        )
                    }),
            }),
        }
    }
}
