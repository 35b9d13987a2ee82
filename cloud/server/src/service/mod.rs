//! The stations of the cloud as services: each owns one kind of record in the store, calls the
//! pure decisions of `cloud-core`, and is called by the HTTP API.

pub mod catalog;
pub mod evaluation;
pub mod inference;
pub mod jobs;
pub mod queue;
pub mod registry;
pub mod rollouts;
pub mod roots;
pub mod training;

use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use flywheel_shared::ids::Digest;

use crate::store::{Store, StoreError};

/// Why a service did not do what it was asked.
#[derive(Debug, Error)]
pub enum Fault {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The request makes sense, but not now.
    #[error("{0}")]
    Conflict(String),
    /// A stored picture is not one.
    #[error("{0}")]
    Damaged(String),
    /// The server could not do it.
    #[error("{0}")]
    Internal(String),
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Self::Internal(format!("{error:#}"))
    }
}

/// The server's clock, Unix milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// The bytes of a blob that a record names.
fn blob(store: &Store, digest: &Digest) -> Result<Vec<u8>, Fault> {
    store.picture(digest)?.ok_or_else(|| {
        Fault::Internal(format!(
            "the blob {digest} is missing from the data folder; restore it from a backup"
        ))
    })
}

/// Finds the one key that begins with `wanted`; people type the beginning of a digest.
fn by_prefix<'a>(
    what: &str,
    wanted: &str,
    keys: impl Iterator<Item = &'a str>,
) -> Result<&'a str, Fault> {
    let mut found = None;
    for key in keys {
        if key == wanted {
            return Ok(key);
        }
        if key.starts_with(wanted) {
            if found.is_some() {
                return Err(Fault::Invalid(format!(
                    "several {what}s begin with `{wanted}`; type more of the id"
                )));
            }
            found = Some(key);
        }
    }
    match found {
        Some(key) if !wanted.is_empty() => Ok(key),
        _ => Err(Fault::NotFound(format!(
            "there is no {what} `{wanted}`; list them with `ls`"
        ))),
    }
}

/// A lock whose holder panicked still guards valid state here: every change is applied whole or
/// stored first.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_must_be_unambiguous() {
        let keys = ["abc1", "abc2", "b"];
        let find = |wanted: &str| by_prefix("model", wanted, keys.iter().copied());
        assert_eq!(find("abc1").unwrap(), "abc1");
        assert_eq!(find("b").unwrap(), "b");
        assert!(matches!(find("abc"), Err(Fault::Invalid(_))));
        assert!(matches!(find("x"), Err(Fault::NotFound(_))));
        assert!(matches!(
            find(""),
            Err(Fault::Invalid(_) | Fault::NotFound(_))
        ));
    }
}
