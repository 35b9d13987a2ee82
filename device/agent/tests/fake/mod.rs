//! A cloud in one file: it speaks QUIC, remembers what it is told, and acknowledges all of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use flywheel_agent::identity::{Endpoints, Identity, NewIdentity, TrustBytes};
use flywheel_agent::{enroll, wire};
use flywheel_shared::envelope;
use flywheel_shared::ids::{DeviceId, Digest, SampleKey};
use flywheel_shared::message::{
    Ack, Chunk, Desired, Down, EpochBook, LossReason, OfferMessage, Record, SlotSeen, SlotState,
    Up, Welcome, records,
};
use flywheel_shared::trust::{
    Keys, Offer, Role, Signed, SignedRoot, TimeStamp, TrustRoot, batch_digest, check, sign,
};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, RecvStream, SendStream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Longest time that a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(120);

/// A record that arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrived {
    pub loss: Option<LossReason>,
    pub frame: u64,
    pub model: [u8; 8],
}

/// What the last health message said.
#[derive(Clone, Debug)]
pub struct Told {
    pub frame: u64,
    pub idle: bool,
    pub live: Option<Digest>,
    pub bytes_seen: u64,
    pub bytes_up: u64,
    pub books: Vec<EpochBook>,
}

/// A model to offer.
pub struct Release {
    pub manifest: Vec<u8>,
    pub signature: [u8; 64],
    pub sequence: u64,
    pub parts: BTreeMap<Digest, Vec<u8>>,
}

#[derive(Default)]
pub struct Memory {
    pub records: BTreeMap<SampleKey, Arrived>,
    pub health: Option<Told>,
    pub reports: Vec<(SlotState, u16)>,
    pub run_until: u64,
    pub release: Option<Release>,
    pub fetched: usize,
}

pub struct Cloud {
    pub memory: Mutex<Memory>,
    changed: Condvar,
    device: DeviceId,
    device_key: SigningKey,
    rollout: SigningKey,
    _runtime: tokio::runtime::Runtime,
}

/// A trust root as it is stored, signed by all of `keys`.
pub fn signed_root(root: &TrustRoot, keys: &[&SigningKey]) -> Vec<u8> {
    let body = wire::bytes(root);
    let signatures: Vec<u8> = keys
        .iter()
        .flat_map(|key| {
            let public = key.verifying_key().to_bytes();
            [&public[..], &sign(Role::Root, key, &body)].concat()
        })
        .collect();
    wire::bytes(&SignedRoot {
        body: &body,
        signatures: &signatures,
    })
}

pub fn release_key() -> SigningKey {
    SigningKey::from_bytes(&[2; 32])
}

impl Cloud {
    /// Starts a cloud and writes the identity of a device for it.
    pub fn start(data: &Path) -> Arc<Self> {
        flywheel_agent::identity::install_crypto();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let server_key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec!["flywheel".to_owned()])
            .unwrap()
            .signed_by(&server_key, &authority)
            .unwrap();

        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from(authority.der().to_vec()))
            .unwrap();
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .build()
            .unwrap();
        let mut tls = rustls::ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from(server.der().to_vec())],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(server_key.serialize_der())),
            )
            .unwrap();
        tls.alpn_protocols = vec![b"flywheel/1".to_vec()];
        let config =
            quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let endpoint = runtime
            .block_on(async { Endpoint::server(config, "127.0.0.1:0".parse().unwrap()) })
            .unwrap();
        let address = endpoint.local_addr().unwrap().to_string();

        let device: DeviceId = "cam1".parse().unwrap();
        let device_key = SigningKey::from_bytes(&[9; 32]);
        let (key_pem, csr) = enroll::certificate_request(&device_key, Some(&device)).unwrap();
        let certificate = rcgen::CertificateSigningRequestParams::from_pem(&csr)
            .unwrap()
            .signed_by(&authority)
            .unwrap();
        let root = SigningKey::from_bytes(&[1; 32]);
        let rollout = SigningKey::from_bytes(&[3; 32]);
        let trust = signed_root(
            &TrustRoot {
                version: 1,
                issued_ms: 0,
                expires_ms: u64::MAX,
                root: Keys::one(root.verifying_key().to_bytes()),
                release: release_key().verifying_key().to_bytes(),
                rollout: rollout.verifying_key().to_bytes(),
                min_sequence: 0,
            },
            &[&root],
        );
        Identity::store(
            data,
            &NewIdentity {
                key_pem: &key_pem,
                certificate_pem: &certificate.pem(),
                authority_pem: &authority.pem(),
                trust: &TrustBytes::verify(trust, Path::new("test")).unwrap().0,
                endpoints: &Endpoints {
                    device: device.to_string(),
                    mqtt: "127.0.0.1:1".to_owned(),
                    quic: address,
                    server_name: "flywheel".to_owned(),
                },
            },
        )
        .unwrap();

        let cloud = Arc::new(Self {
            memory: Mutex::default(),
            changed: Condvar::new(),
            device,
            device_key,
            rollout,
            _runtime: runtime,
        });
        let serving = Arc::clone(&cloud);
        cloud._runtime.spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let cloud = Arc::clone(&serving);
                tokio::spawn(async move {
                    let connection = incoming.await.unwrap();
                    let (send, receive) = connection.accept_bi().await.unwrap();
                    cloud.serve(send, receive).await;
                });
            }
        });
        cloud
    }

    /// Changes what the cloud wants, or looks at what it knows.
    pub fn with<T>(&self, act: impl FnOnce(&mut Memory) -> T) -> T {
        act(&mut self.memory.lock().unwrap())
    }

    /// Waits until the cloud knows something.
    pub fn wait(&self, what: &str, known: impl Fn(&Memory) -> bool) {
        let memory = self.memory.lock().unwrap();
        let (memory, timeout) = self
            .changed
            .wait_timeout_while(memory, PATIENCE, |memory| !known(memory))
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "waited in vain for {what}; last health {:?}, reports {:?}",
            memory.health,
            memory.reports
        );
    }

    async fn serve(&self, mut send: SendStream, mut receive: RecvStream) {
        loop {
            let mut envelope = vec![0; 8];
            if receive.read_exact(&mut envelope).await.is_err() {
                return;
            }
            let len = u32::from_le_bytes(envelope[..4].try_into().unwrap()) as usize;
            envelope.resize(8 + len, 0);
            if receive.read_exact(&mut envelope[8..]).await.is_err() {
                return;
            }
            let (payload, _) = envelope::split(&envelope, 1 << 20).unwrap();
            let answers = self.handle(&postcard::from_bytes(payload).unwrap());
            self.changed.notify_all();
            for answer in answers {
                if send.write_all(&answer).await.is_err() {
                    return;
                }
            }
        }
    }

    fn handle(&self, message: &Up<'_>) -> Vec<Vec<u8>> {
        let mut memory = self.memory.lock().unwrap();
        match message {
            Up::Hello(hello) => {
                assert_eq!(hello.device, self.device);
                vec![down(&Down::Welcome(Welcome {
                    wire_version: 1,
                    now_ms: 0,
                }))]
            }
            Up::Batch(batch) => {
                let digest = batch_digest(&self.device, batch.epoch, batch.count, batch.records);
                let key = self.device_key.verifying_key().to_bytes();
                check(Role::Device, &key, &digest, batch.signature).unwrap();
                let mut ack = Ack {
                    epoch: batch.epoch,
                    ranges: heapless::Vec::new(),
                };
                for record in records(batch.records) {
                    let record = record.unwrap();
                    let key = SampleKey {
                        epoch: batch.epoch,
                        seq: record.seq(),
                    };
                    let arrived = match record {
                        Record::Sample(sample) => Arrived {
                            loss: None,
                            frame: sample.frame,
                            model: sample.model,
                        },
                        Record::Loss(loss) => Arrived {
                            loss: Some(loss.reason),
                            frame: 0,
                            model: [0; 8],
                        },
                    };
                    memory.records.insert(key, arrived);
                    match ack.ranges.last_mut() {
                        Some(last) if last.1 + 1 == key.seq => last.1 = key.seq,
                        _ => ack.ranges.push((key.seq, key.seq)).unwrap(),
                    }
                }
                vec![down(&Down::Ack(ack))]
            }
            Up::Health(health) => {
                memory.health = Some(Told {
                    frame: health.frame,
                    idle: health.idle,
                    live: health.live,
                    bytes_seen: health.bytes_seen,
                    bytes_up: health.bytes_up,
                    books: health.books.to_vec(),
                });
                let mut answers = vec![down(&Down::Desired(Desired {
                    run_until: memory.run_until,
                    health_at_ms: health.at_ms,
                }))];
                if let Some(release) = &memory.release
                    && health.candidate.is_none()
                    && health.live != Some(Digest::of(&release.manifest))
                {
                    answers.push(self.offer(release));
                }
                answers
            }
            Up::Slot(report) => {
                memory.reports.push((report.state, report.code));
                vec![down(&Down::SlotSeen(SlotSeen {
                    manifest: report.manifest,
                    state: report.state,
                }))]
            }
            Up::Attest(attest) => {
                let body = wire::bytes(&TimeStamp {
                    device: self.device.clone(),
                    nonce: attest.nonce,
                    now_ms: flywheel_agent::clock::unix_ms(),
                });
                let signature = sign(Role::Time, &self.rollout, &body);
                vec![down(&Down::Time(Signed {
                    body: &body,
                    signature: &signature,
                }))]
            }
            Up::Fetch(fetch) => {
                memory.fetched += fetch.len as usize;
                let part = &memory.release.as_ref().unwrap().parts[&fetch.digest];
                let start = fetch.offset as usize;
                vec![down(&Down::Chunk(Chunk {
                    digest: fetch.digest,
                    offset: fetch.offset,
                    bytes: &part[start..start + fetch.len as usize],
                }))]
            }
        }
    }

    fn offer(&self, release: &Release) -> Vec<u8> {
        let body = wire::bytes(&Offer {
            device: self.device.clone(),
            manifest: Digest::of(&release.manifest),
            sequence: release.sequence,
            issued_ms: 0,
            expires_ms: u64::MAX,
            nonce: 1,
        });
        let signature = sign(Role::Rollout, &self.rollout, &body);
        down(&Down::Offer(OfferMessage {
            offer: Signed {
                body: &body,
                signature: &signature,
            },
            manifest: Signed {
                body: &release.manifest,
                signature: &release.signature,
            },
        }))
    }
}

fn down(message: &Down<'_>) -> Vec<u8> {
    let payload = wire::bytes(message);
    let mut out = envelope::header(&payload).to_vec();
    out.extend_from_slice(&payload);
    out
}
