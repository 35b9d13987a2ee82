//! The fleet's certificate authority: one root, a server certificate for both transports, and one
//! certificate per device.
//!
//! The authority is private to the fleet: devices trust it and nothing else, and the server lets
//! in only what it has signed. A certificate's subject is written here, whatever the request says,
//! with the device id as organisation (which MQTT brokers read as the tenant) and common name.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flywheel_shared::ids::DeviceId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData as _, SerialNumber,
};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// The name that devices expect in the server's certificate, whatever its address is.
pub const SERVER_NAME: &str = "flywheel";
/// ALPN of the QUIC transport.
pub const ALPN: &[u8] = b"flywheel/1";

const DAY: u64 = 24 * 60 * 60;
const CA_DAYS: u64 = 20 * 365;
const LEAF_DAYS: u64 = 365;
/// Certificates begin this long before they are issued, since devices' clocks run behind.
const BACKDATED_DAYS: u64 = 2;

/// Why the authority does not work.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file operation failed.
    #[error("{}: {error}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A stored key or certificate is not one.
    #[error(
        "{} is not usable: {why}; restore it from a backup (without it, every device must be \
         enrolled again)", .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The certificate request is not acceptable.
    #[error("the certificate request is refused: {0}")]
    Request(String),
    /// Making a certificate failed.
    #[error("no certificate could be made: {0}")]
    Make(#[from] rcgen::Error),
    /// The TLS configuration is not accepted.
    #[error("TLS can't be set up: {0}")]
    Tls(String),
}

/// Files for software that takes paths, such as the embedded broker.
#[derive(Clone, Debug)]
pub struct PkiPaths {
    /// The root certificate, PEM.
    pub ca: PathBuf,
    /// The server's certificate, PEM.
    pub server_cert: PathBuf,
    /// The server's private key, PEM.
    pub server_key: PathBuf,
}

/// A device's new certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// The ed25519 key in it, with which the device also signs its batches.
    pub public_key: [u8; 32],
}

/// Who the cloud's ingest is to an external broker; not a possible device id.
pub const INGEST_NAME: &str = "flywheel-ingest";

/// The authority.
pub struct Pki {
    paths: PkiPaths,
    ca_pem: String,
    server_pem: String,
    server_key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Opens the authority in `dir`, making it if there is none. The server's certificate is
    /// issued anew at every start, for [`SERVER_NAME`], `localhost`, 127.0.0.1, ::1 and `hosts`
    /// (names or addresses).
    pub fn open(dir: &Path, hosts: &[String], now_ms: u64) -> Result<Self, PkiError> {
        install_crypto();
        let paths = PkiPaths {
            ca: dir.join("ca.pem"),
            server_cert: dir.join("server.pem"),
            server_key: dir.join("server.key.pem"),
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| io(dir, error))?;
        let ca_key_path = dir.join("ca.key.pem");
        let ca_key = stored_key(&ca_key_path)?;
        let ca_pem = match read(&paths.ca)? {
            Some(pem) => pem,
            None => {
                let pem = ca_params(now_ms).self_signed(&ca_key)?.pem();
                write(&paths.ca, &pem)?;
                pem
            }
        };
        let issuer =
            Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(|error| PkiError::Damaged {
                path: paths.ca.clone(),
                why: error.to_string(),
            })?;
        let server_key = stored_key(&paths.server_key)?;
        let server = server_params(hosts, now_ms)?.signed_by(&server_key, &issuer)?;
        write(&paths.server_cert, &server.pem())?;
        Ok(Self {
            ca_pem,
            server_pem: server.pem(),
            server_key_pem: server_key.serialize_pem(),
            issuer,
            paths,
        })
    }

    /// Certificate and private key, PEM, with which the cloud's ingest is [`INGEST_NAME`] to an
    /// external broker. Made anew at each call; nothing is stored.
    pub fn ingest_client(&self, now_ms: u64) -> Result<(String, String), PkiError> {
        let mut params = leaf_params(LEAF_DAYS, now_ms);
        params
            .distinguished_name
            .push(DnType::CommonName, INGEST_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.certify(params)
    }

    /// Certificate and private key, PEM, of an external broker that devices reach under `hosts`.
    /// Made anew at each call; nothing is stored.
    pub fn broker(&self, hosts: &[String], now_ms: u64) -> Result<(String, String), PkiError> {
        self.certify(server_params(hosts, now_ms)?)
    }

    fn certify(&self, params: CertificateParams) -> Result<(String, String), PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// The root certificate, which devices pin.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Where the certificates are.
    pub fn paths(&self) -> &PkiPaths {
        &self.paths
    }

    /// Issues a certificate for the ed25519 key of a request, for `device` and one year. Only the
    /// key and the proof of possessing it are taken from the request.
    pub fn issue(&self, csr_pem: &str, device: &DeviceId, now_ms: u64) -> Result<Issued, PkiError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|error| PkiError::Request(error.to_string()))?;
        let key = &request.public_key;
        if key.algorithm() != &PKCS_ED25519 {
            return Err(PkiError::Request(
                "its key is not an ed25519 key".to_owned(),
            ));
        }
        let public_key = <[u8; 32]>::try_from(key.der_bytes())
            .map_err(|_| PkiError::Request("its key does not have 32 bytes".to_owned()))?;
        let mut params = leaf_params(LEAF_DAYS, now_ms);
        params
            .distinguished_name
            .push(DnType::OrganizationName, device.as_str());
        params
            .distinguished_name
            .push(DnType::CommonName, device.as_str());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let request = CertificateSigningRequestParams {
            params,
            public_key: request.public_key,
        };
        Ok(Issued {
            certificate_pem: request.signed_by(&self.issuer)?.pem(),
            public_key,
        })
    }

    /// TLS 1.3 for QUIC: the server's certificate, and no client without one of this authority.
    pub fn quic_config(&self) -> Result<rustls::ServerConfig, PkiError> {
        let tls = |error: &dyn std::fmt::Display| PkiError::Tls(error.to_string());
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).map_err(|e| tls(&e))?;
        roots.add(ca).map_err(|e| tls(&e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|e| tls(&e))?;
        let certificate =
            CertificateDer::from_pem_slice(self.server_pem.as_bytes()).map_err(|e| tls(&e))?;
        let key =
            PrivateKeyDer::from_pem_slice(self.server_key_pem.as_bytes()).map_err(|e| tls(&e))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)
            .map_err(|e| tls(&e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

/// Makes ring the process's TLS provider, if none is set yet.
pub fn install_crypto() {
    // An error means that it is done already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The device that a certificate (DER) of this authority is for.
pub fn certificate_device(der: &[u8]) -> Option<DeviceId> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let mut organisations = certificate.subject().iter_organization();
    let device = organisations.next()?.as_str().ok()?.parse().ok()?;
    organisations.next().is_none().then_some(device)
}

fn ca_params(now_ms: u64) -> CertificateParams {
    let mut params = leaf_params(CA_DAYS, now_ms);
    params
        .distinguished_name
        .push(DnType::CommonName, "Flywheel fleet");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn server_params(hosts: &[String], now_ms: u64) -> Result<CertificateParams, PkiError> {
    let mut names: Vec<String> = [SERVER_NAME, "localhost", "127.0.0.1", "::1"]
        .map(str::to_owned)
        .into();
    for host in hosts {
        if !names.contains(host) {
            names.push(host.clone());
        }
    }
    let mut params = leaf_params(LEAF_DAYS, now_ms);
    params.subject_alt_names = CertificateParams::new(names)?.subject_alt_names;
    params
        .distinguished_name
        .push(DnType::CommonName, SERVER_NAME);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

fn leaf_params(days: u64, now_ms: u64) -> CertificateParams {
    let now = now_ms / 1000;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(BACKDATED_DAYS * DAY));
    params.not_after = epoch + Duration::from_secs(now + days * DAY);
    params.distinguished_name = DistinguishedName::new();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = serial();
    params
}

/// A random positive serial; `None` leaves the choice to rcgen, which derives it from the key.
fn serial() -> Option<SerialNumber> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).ok()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Some(SerialNumber::from_slice(&bytes))
}

/// The ECDSA P-256 key in a file, made if there is none. P-256 and not ed25519, because not every
/// external broker's TLS takes an ed25519 authority.
fn stored_key(path: &Path) -> Result<KeyPair, PkiError> {
    if let Some(pem) = read(path)? {
        return KeyPair::from_pem(&pem).map_err(|error| PkiError::Damaged {
            path: path.to_owned(),
            why: error.to_string(),
        });
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    write(path, &key.serialize_pem())?;
    Ok(key)
}

fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(path, error)),
    }
}

/// Writes a file that only its owner reads, all or nothing.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), PkiError> {
    let temporary = path.with_extension("tmp");
    let written = (|| {
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    })();
    written.map_err(|error| io(path, error))
}

fn io(path: &Path, error: std::io::Error) -> PkiError {
    PkiError::Io {
        path: path.to_owned(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    const NOW: u64 = 1_800_000_000_000;

    fn request(organisation: &str, key: &KeyPair) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, organisation);
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    #[test]
    fn a_certificate_names_the_device_whatever_the_request_says() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &[], NOW).unwrap();
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let device: DeviceId = "cam1".parse().unwrap();
        let issued = pki.issue(&request("cam2", &key), &device, NOW).unwrap();
        assert_eq!(issued.public_key, key.public_key_raw());
        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        assert_eq!(certificate_device(&der), Some(device));
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(!parsed.is_ca());
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
        let from = parsed.validity().not_before.timestamp();
        let until = parsed.validity().not_after.timestamp();
        assert!(from < (NOW / 1000) as i64 && until == (NOW / 1000 + LEAF_DAYS * DAY) as i64);
    }

    #[test]
    fn other_keys_forged_and_broken_requests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &[], NOW).unwrap();
        let device: DeviceId = "cam1".parse().unwrap();
        let p256 = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let refused = |pem: &str| matches!(pki.issue(pem, &device, NOW), Err(PkiError::Request(_)));
        assert!(refused(&request("cam1", &p256)));
        assert!(refused("nonsense"));
        assert!(refused(""));
        // One digit of the signature changed.
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let pem = request("cam1", &key);
        let mut lines: Vec<String> = pem.lines().map(str::to_owned).collect();
        let last = lines.len() - 2;
        let other = if lines[last].starts_with('A') {
            "B"
        } else {
            "A"
        };
        lines[last].replace_range(..1, other);
        assert!(refused(&lines.join("\n")));
    }

    #[test]
    fn the_authority_survives_a_restart_and_its_files_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = Pki::open(dir.path(), &[], NOW).unwrap();
        let again = Pki::open(dir.path(), &["edge.example".to_owned()], NOW + 1).unwrap();
        assert_eq!(first.ca_pem(), again.ca_pem());
        assert_eq!(first.server_key_pem, again.server_key_pem);
        for entry in fs::read_dir(dir.path()).unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0);
        }
        fs::write(dir.path().join("ca.key.pem"), "x").unwrap();
        let error = Pki::open(dir.path(), &[], NOW).err().unwrap().to_string();
        assert!(error.contains("ca.key.pem"), "{error}");
    }
}
