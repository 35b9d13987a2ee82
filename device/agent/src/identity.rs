//! Who the device is: its key, its certificate, the authority it trusts on connections, the keys
//! it trusts on models, and where the cloud is. One folder, private to its owner.
//!
//! One ed25519 key serves TLS and the signing of batches; the domain prefix of
//! [`flywheel_shared::trust`] keeps the two uses apart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use flywheel_shared::ids::DeviceId;
use flywheel_shared::trust::{SignedRoot, TrustError, TrustRoot};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files;

/// PKCS#8 version 1 of an ed25519 key is these bytes and the 32 bytes of the seed (RFC 8410).
const PKCS8_ED25519: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

const TRUST_FILE: &str = "trust.bin";

/// The protocol that both sides name in the TLS handshake of QUIC.
pub const ALPN: &[u8] = b"flywheel/1";

/// Why an identity cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// There is none.
    #[error(
        "{0}: this device is not enrolled; run `flywheel-agent enroll` with a token from the server first"
    )]
    NotEnrolled(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {problem}; enrol the device again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The trust root is not signed by its own root keys.
    #[error("{path}: the trust root is not believed: {source}; enrol the device again")]
    Untrusted {
        /// The file, or where it was offered.
        path: PathBuf,
        /// Why.
        source: TrustError,
    },
}

/// Where the cloud listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoints {
    /// The device's name.
    pub device: String,
    /// `HOST:PORT` of the MQTT broker.
    pub mqtt: String,
    /// `HOST:PORT` of the QUIC listener.
    pub quic: String,
    /// The name in the cloud's certificate.
    pub server_name: String,
}

/// A signed trust root as it is stored and transferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBytes(Vec<u8>);

impl TrustBytes {
    /// Checks the postcard bytes of a [`SignedRoot`]; `origin` is named in the error.
    pub fn verify(bytes: Vec<u8>, origin: &Path) -> Result<(Self, TrustRoot), IdentityError> {
        let refuse = |source| IdentityError::Untrusted {
            path: origin.to_owned(),
            source,
        };
        let root = SignedRoot::from_bytes(&bytes)
            .and_then(TrustRoot::pin)
            .map_err(refuse)?
            .into_inner();
        Ok((Self(bytes), root))
    }
}

/// An enrolled device.
pub struct Identity {
    /// Its name.
    pub device: DeviceId,
    /// Its key, which signs batches.
    pub key: SigningKey,
    /// The keys it believes.
    pub trust: TrustRoot,
    /// Where the cloud is.
    pub endpoints: Endpoints,
    certificates: Vec<CertificateDer<'static>>,
    authority: CertificateDer<'static>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_struct("Identity")
            .field("device", &self.device)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

/// The folder of the identity inside the data folder.
pub fn folder(data: &Path) -> PathBuf {
    data.join("identity")
}

/// The file of the newest trust root that the device believes.
pub fn trust_file(data: &Path) -> PathBuf {
    folder(data).join(TRUST_FILE)
}

/// Whether a data folder holds a complete identity.
pub fn exists(data: &Path) -> bool {
    // The endpoints are written last.
    folder(data).join("endpoints.toml").exists()
}

/// PKCS#8 bytes of an ed25519 key.
pub fn pkcs8(key: &SigningKey) -> Vec<u8> {
    [&PKCS8_ED25519[..], key.as_bytes()].concat()
}

/// What enrolment stores.
pub struct NewIdentity<'a> {
    /// The device's key.
    pub key_pem: &'a str,
    /// Its certificate.
    pub certificate_pem: &'a str,
    /// The authority of the fleet.
    pub authority_pem: &'a str,
    /// The keys it shall believe.
    pub trust: &'a TrustBytes,
    /// Where the cloud is.
    pub endpoints: &'a Endpoints,
}

impl Identity {
    /// Writes a new identity; a power cut leaves none or all of it.
    pub fn store(data: &Path, new: &NewIdentity<'_>) -> Result<(), IdentityError> {
        let folder = folder(data);
        let io = |path: &Path, source| IdentityError::Io {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(&folder).map_err(|source| io(&folder, source))?;
        files::make_private(&folder).map_err(|source| io(&folder, source))?;
        let endpoints = toml::to_string(new.endpoints).map_err(|error| IdentityError::Damaged {
            path: folder.join("endpoints.toml"),
            problem: error.to_string(),
        })?;
        // With --force an old identity may be there: it is invalid from the first new file on.
        let last = folder.join("endpoints.toml");
        match fs::remove_file(&last) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io(&last, source));
            }
            _ => {}
        }
        for (name, bytes) in [
            ("key.pem", new.key_pem.as_bytes()),
            ("cert.pem", new.certificate_pem.as_bytes()),
            ("ca.pem", new.authority_pem.as_bytes()),
            (TRUST_FILE, &new.trust.0),
            ("endpoints.toml", endpoints.as_bytes()),
        ] {
            let path = folder.join(name);
            files::replace(&path, bytes).map_err(|source| io(&path, source))?;
        }
        Ok(())
    }

    /// Reads and checks the identity in a data folder.
    pub fn load(data: &Path) -> Result<Self, IdentityError> {
        if !exists(data) {
            return Err(IdentityError::NotEnrolled(data.to_owned()));
        }
        let folder = folder(data);
        let read = |name: &str| {
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok((path, bytes)),
                Err(source) => Err(IdentityError::Io { path, source }),
            }
        };
        let damaged = |path: &Path, problem: String| IdentityError::Damaged {
            path: path.to_owned(),
            problem,
        };
        let (path, bytes) = read("endpoints.toml")?;
        let endpoints: Endpoints = std::str::from_utf8(&bytes)
            .map_err(|error| damaged(&path, error.to_string()))
            .and_then(|text| {
                toml::from_str(text).map_err(|error| damaged(&path, error.to_string()))
            })?;
        let device = endpoints
            .device
            .parse()
            .map_err(|error| damaged(&path, format!("`device`: {error}")))?;
        let (path, bytes) = read("key.pem")?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&bytes)
            .ok()
            .and_then(|der| signing_key(der.secret_pkcs8_der()))
            .ok_or_else(|| damaged(&path, "holds no ed25519 key in PKCS#8".to_owned()))?;
        let certificates = |name: &str| {
            let (path, bytes) = read(name)?;
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
            match all {
                Ok(all) if !all.is_empty() => Ok(all),
                _ => Err(damaged(&path, "holds no certificate".to_owned())),
            }
        };
        let own = certificates("cert.pem")?;
        let authority = certificates("ca.pem")?.swap_remove(0);
        let (path, bytes) = read(TRUST_FILE)?;
        let (_, trust) = TrustBytes::verify(bytes, &path)?;
        Ok(Self {
            device,
            key,
            trust,
            endpoints,
            certificates: own,
            authority,
        })
    }

    /// The device's certificate, in DER.
    pub fn certificate(&self) -> &[u8] {
        self.certificates.first().map_or(&[], |first| first)
    }

    /// TLS settings for a connection to the cloud: client certificate, the fleet's authority only,
    /// and the name in the server's certificate from the identity, whatever address it is
    /// reached at. `quic` selects TLS 1.3 only and the protocol name.
    pub fn tls(&self, quic: bool) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone())?;
        let verifier = NamedServer {
            inner: WebPkiServerVerifier::builder_with_provider(
                Arc::new(roots),
                Arc::clone(&provider),
            )
            .build()
            .map_err(|error| TlsError::Other(error.to_string()))?,
            name: ServerName::try_from(self.endpoints.server_name.clone())
                .map_err(|error| TlsError::Other(error.to_string()))?,
        };
        let versions = if quic {
            &[&rustls::version::TLS13][..]
        } else {
            &[&rustls::version::TLS13, &rustls::version::TLS12][..]
        };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8(&self.key)));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.certificates.clone(), key)?;
        if quic {
            config.alpn_protocols = vec![ALPN.to_vec()];
        }
        Ok(config)
    }
}

/// Why TLS cannot be set up from an identity.
#[derive(Debug, Error)]
pub enum TlsError {
    /// rustls refuses a key or certificate.
    #[error("the identity's certificates are not usable: {0}; enrol the device again")]
    Rustls(#[from] rustls::Error),
    /// Something else about the identity is wrong.
    #[error("the identity is not usable for TLS: {0}; enrol the device again")]
    Other(String),
}

/// Makes the ring provider the process's default, which rumqttc and quinn fall back to.
pub fn install_crypto() {
    if CryptoProvider::get_default().is_none() {
        // An error only means that somebody else was faster with the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// The seed inside PKCS#8, version 1 or 2 (which appends the public key).
fn signing_key(der: &[u8]) -> Option<SigningKey> {
    // Version 2 differs in the outer length, the version and what follows the seed.
    let at = der
        .windows(9)
        .position(|window| window == &PKCS8_ED25519[7..])?;
    let seed: [u8; 32] = der.get(at + 9..at + 41)?.try_into().ok()?;
    Some(SigningKey::from_bytes(&seed))
}

/// Checks the server's chain as usual, but against the name that was fixed at enrolment. The
/// address that a device dials may be an IP address or a tunnel and proves nothing.
#[derive(Debug)]
struct NamedServer {
    inner: Arc<WebPkiServerVerifier>,
    name: ServerName<'static>,
}

impl ServerCertVerifier for NamedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _dialled: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner
            .verify_server_cert(end_entity, intermediates, &self.name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_pkcs8_give_the_same_key() {
        let key = SigningKey::from_bytes(&[7; 32]);
        assert_eq!(signing_key(&pkcs8(&key)), Some(key.clone()));
        // ring writes version 2.
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let key = signing_key(&pair.serialize_der()).unwrap();
        assert_eq!(key.verifying_key().as_bytes(), pair.public_key_raw());
        assert_eq!(signing_key(b"nothing"), None);
    }

    #[test]
    fn a_folder_without_identity_says_what_to_do() {
        let data = tempfile::tempdir().unwrap();
        let error = Identity::load(data.path()).unwrap_err();
        assert!(error.to_string().contains("flywheel-agent enroll"));
    }

    #[test]
    fn a_trust_root_that_was_changed_is_not_believed() {
        use flywheel_shared::trust::{Keys, Role, sign};
        let [key, release, rollout] = [3, 4, 5].map(|n| SigningKey::from_bytes(&[n; 32]));
        let public = |key: &SigningKey| key.verifying_key().to_bytes();
        let root = TrustRoot {
            version: 1,
            root: Keys::one(public(&key)),
            release: public(&release),
            rollout: public(&rollout),
            ..TrustRoot::default()
        };
        let body = crate::wire::bytes(&root);
        let signature = sign(Role::Root, &key, &body);
        let mut bytes = crate::wire::bytes(&SignedRoot {
            body: &body,
            signatures: &[&public(&key)[..], &signature].concat(),
        });
        let origin = Path::new("trust.bin");
        assert_eq!(TrustBytes::verify(bytes.clone(), origin).unwrap().1, root);
        let at = body.len() / 2;
        bytes[at] ^= 1;
        assert!(matches!(
            TrustBytes::verify(bytes, origin),
            Err(IdentityError::Untrusted { .. })
        ));
    }
}
