//! Enrolment: the device makes a key, proves that it holds it, and trades a one-time token for a
//! certificate, the keys it shall believe and the addresses of the cloud.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use flywheel_shared::ids::DeviceId;
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ED25519};
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files;
use crate::identity::{self, Endpoints, Identity, IdentityError, NewIdentity, TrustBytes};

/// Where, as whom and with which token to enrol.
#[derive(Clone, Debug)]
pub struct Request {
    /// `http://HOST:PORT` of the server.
    pub url: String,
    /// The one-time token.
    pub token: String,
    /// The agent's data folder; made if it is not there.
    pub data: PathBuf,
    /// The wanted name; the server chooses one if there is none.
    pub device: Option<DeviceId>,
    /// Replace an identity that is there.
    pub force: bool,
}

/// Why a device was not enrolled. The token is spent only if the server answered.
#[derive(Debug, Error)]
pub enum EnrollError {
    /// There is an identity.
    #[error(
        "{0}: already enrolled; pass --force to replace the identity, which ends the old one's use"
    )]
    Enrolled(PathBuf),
    /// The server was not reached.
    #[error("{url}: the server was not reached: {source}; is `flywheel serve` running there?")]
    Unreachable {
        /// The URL.
        url: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// The server said no.
    #[error("{url}: the server refused ({status}): {message}")]
    Refused {
        /// The URL.
        url: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The answer makes no sense.
    #[error("{url}: the server's answer is not usable: {problem}")]
    Answer {
        /// The URL.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The key or the request could not be made.
    #[error("cannot make the device's key and certificate request: {0}")]
    Key(String),
    /// The identity could not be stored or is not believed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The data folder could not be made.
    #[error("{path}: cannot make the data folder: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[derive(Serialize)]
struct Ask<'a> {
    token: &'a str,
    csr_pem: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
}

#[derive(Deserialize)]
struct Answer {
    device: String,
    certificate_pem: String,
    ca_pem: String,
    trust_hex: String,
    mqtt: String,
    quic: String,
    server_name: String,
}

/// Enrols a device and stores its identity. Returns its name.
///
/// # Errors
/// [`EnrollError`]; an identity that was there is untouched unless the last step fails.
pub fn enroll(request: &Request) -> Result<DeviceId, EnrollError> {
    if identity::exists(&request.data) && !request.force {
        return Err(EnrollError::Enrolled(request.data.clone()));
    }
    fs::create_dir_all(&request.data)
        .and_then(|()| files::make_private(&request.data))
        .map_err(|source| EnrollError::Folder {
            path: request.data.clone(),
            source,
        })?;
    let mut seed = [0u8; 32];
    getrandom::fill(&mut seed).map_err(|error| EnrollError::Key(error.to_string()))?;
    let key = SigningKey::from_bytes(&seed);
    let (key_pem, csr_pem) = certificate_request(&key, request.device.as_ref())
        .map_err(|error| EnrollError::Key(error.to_string()))?;
    let url = format!("{}/v1/enroll", request.url.trim_end_matches('/'));
    let answer = ask(
        &url,
        &Ask {
            token: &request.token,
            csr_pem: &csr_pem,
            device: request.device.as_ref().map(DeviceId::as_str),
        },
    )?;
    let unusable = |problem: String| EnrollError::Answer {
        url: url.clone(),
        problem,
    };
    let device: DeviceId = answer
        .device
        .parse()
        .map_err(|error| unusable(format!("`device` {:?}: {error}", answer.device)))?;
    let trust = hex::decode(&answer.trust_hex)
        .map_err(|error| unusable(format!("`trust_hex`: {error}")))?;
    let (trust, _) = TrustBytes::verify(trust, Path::new(&url))?;
    Identity::store(
        &request.data,
        &NewIdentity {
            key_pem: &key_pem,
            certificate_pem: &answer.certificate_pem,
            authority_pem: &answer.ca_pem,
            trust: &trust,
            endpoints: &Endpoints {
                device: answer.device,
                mqtt: answer.mqtt,
                quic: answer.quic,
                server_name: answer.server_name,
            },
        },
    )?;
    // What was stored must be usable, or the device would find out in the field.
    Identity::load(&request.data)?
        .tls(true)
        .map_err(|error| unusable(error.to_string()))?;
    Ok(device)
}

/// PEM of the key and of a certificate request whose organisation (which brokers read as the
/// tenant) and common name are the device's. The server puts the final name in the certificate.
pub fn certificate_request(
    key: &SigningKey,
    device: Option<&DeviceId>,
) -> Result<(String, String), rcgen::Error> {
    let der = identity::pkcs8(key);
    let pair = KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(der.as_slice()),
        &PKCS_ED25519,
    )?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(device) = device {
        let name = &mut params.distinguished_name;
        name.push(DnType::OrganizationName, device.as_str());
        name.push(DnType::CommonName, device.as_str());
    }
    let csr = params.serialize_request(&pair)?.pem()?;
    Ok((pair.serialize_pem(), csr))
}

fn ask(url: &str, ask: &Ask<'_>) -> Result<Answer, EnrollError> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(30)))
        .build()
        .into();
    let unreachable = |source: ureq::Error| EnrollError::Unreachable {
        url: url.to_owned(),
        source: Box::new(source),
    };
    let mut response = agent.post(url).send_json(ask).map_err(unreachable)?;
    let status = response.status().as_u16();
    let body = response
        .body_mut()
        .with_config()
        .limit(1 << 20)
        .read_to_string()
        .map_err(unreachable)?;
    if !(200..300).contains(&status) {
        return Err(EnrollError::Refused {
            url: url.to_owned(),
            status,
            message: reason(&body),
        });
    }
    serde_json::from_str(&body).map_err(|error| EnrollError::Answer {
        url: url.to_owned(),
        problem: error.to_string(),
    })
}

/// The reason in an error body: its `error` field, or the text itself.
fn reason(body: &str) -> String {
    let field = serde_json::from_str::<serde_json::Value>(body)
        .ok()
        .and_then(|value| {
            ["error", "detail", "message"]
                .iter()
                .find_map(|name| value.get(name)?.as_str().map(str::to_owned))
        });
    field.unwrap_or_else(|| body.trim().chars().take(300).collect())
}

#[cfg(test)]
mod tests {
    use rcgen::CertificateSigningRequestParams;

    use super::*;

    #[test]
    fn the_request_proves_the_key_and_names_the_device() {
        let key = SigningKey::from_bytes(&[9; 32]);
        let device: DeviceId = "cam7".parse().unwrap();
        let (key_pem, csr) = certificate_request(&key, Some(&device)).unwrap();
        assert!(key_pem.contains("BEGIN PRIVATE KEY"));
        // Parsing checks the signature.
        let parsed = CertificateSigningRequestParams::from_pem(&csr).unwrap();
        let name = &parsed.params.distinguished_name;
        let text = |value: Option<&rcgen::DnValue>| format!("{value:?}");
        assert!(text(name.get(&DnType::OrganizationName)).contains("cam7"));
        assert!(text(name.get(&DnType::CommonName)).contains("cam7"));
    }

    #[test]
    fn an_unreachable_server_is_named_and_nothing_is_stored() {
        let data = tempfile::tempdir().unwrap();
        // A port that was just free and is bound by nobody.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let request = Request {
            url: format!("http://127.0.0.1:{port}"),
            token: "t".to_owned(),
            data: data.path().to_owned(),
            device: None,
            force: false,
        };
        let error = enroll(&request).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()), "{error}");
        assert!(!identity::exists(data.path()));
    }

    #[test]
    fn the_servers_own_words_are_passed_on() {
        assert_eq!(reason("{\"error\":\"token is spent\"}"), "token is spent");
        assert_eq!(reason("no\n"), "no");
    }
}
