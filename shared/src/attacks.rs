//! The attack matrix as code: everything that a malicious cloud, mirror, clock or thief may try
//! against the verifier, written once, without `std` or allocator, so that the very same cases run on
//! the host, on a Cortex-M, and as builders of hostile messages against a whole agent.
//!
//! Each case tries one attack in many variants and names the one [`TrustError`] that a device reports
//! for it. Its keys are public test keys and sign nothing else.

use ed25519_dalek::SigningKey;
use heapless::Vec;
use serde::Serialize;

use crate::ids::{DeviceId, Digest};
use crate::trust::{
    Accepted, Delta, Judge, Keys, MAX_ROOT_SIGNATURES, Manifest, Offer, Part, PartKind, PublicKey,
    ROOT_SIGNATURE, RUNTIME_ABI, Role, Signed, SignedRoot, TimeStamp, TrialBounds, TrustError,
    TrustRoot, sign,
};

pub mod bundle;
pub mod freshness;
pub mod fuzz;
pub mod parser;
pub mod roots;
pub mod software;

/// Room for a body; the good ones are below 400 bytes.
pub const BODY: usize = 1024;

/// A day in milliseconds.
pub const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// When the good trust root was issued, Unix milliseconds.
pub const ISSUED_MS: u64 = 1_800_000_000_000;
/// A moment at which everything good is good.
pub const NOW_MS: u64 = ISSUED_MS + DAY_MS;
/// When the good offer ends.
pub const OFFER_ENDS_MS: u64 = NOW_MS + 600_000;
/// When the good manifest ends.
pub const MANIFEST_ENDS_MS: u64 = NOW_MS + 30 * DAY_MS;
/// When the good trust root ends.
pub const ROOT_ENDS_MS: u64 = ISSUED_MS + 365 * DAY_MS;
/// Sequence of the good manifest.
pub const SEQUENCE: u64 = 300;
/// Floor of the good device.
pub const FLOOR: u64 = 299;
/// Hardware of the good device.
pub const HARDWARE: &str = "m7";
/// Bytes of the good manifest's parts, by kind.
pub const PARTS: [(PartKind, &[u8]); 3] = [
    (PartKind::Onnx, b"weights of release 300"),
    (PartKind::Spec, b"labels and preprocessing"),
    (PartKind::Golden, b"golden inputs"),
];
/// What the good manifest's delta starts from.
pub const BASE: &[u8] = b"weights of release 299";
/// The good manifest's delta.
pub const DELTA: &[u8] = b"9->300";

/// A body and its signature, kept.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The body.
    pub body: Vec<u8, BODY>,
    /// The signature.
    pub signature: [u8; 64],
}

impl Sealed {
    /// Encodes and signs a value. One that does not fit gives an empty body, which nobody takes.
    pub fn of<T: Serialize>(role: Role, key: &SigningKey, value: &T) -> Self {
        Self::raw(role, key, &encode(value))
    }

    /// Signs bytes whatever they are.
    pub fn raw(role: Role, key: &SigningKey, body: &[u8]) -> Self {
        Self {
            body: Vec::from_slice(body).unwrap_or_default(),
            signature: sign(role, key, body),
        }
    }

    /// As the verifier takes it.
    pub fn signed(&self) -> Signed<'_> {
        Signed {
            body: &self.body,
            signature: &self.signature,
        }
    }
}

/// A trust root and its signatures, kept.
#[derive(Clone, Debug)]
pub struct SealedRoot {
    /// The body.
    pub body: Vec<u8, BODY>,
    /// Pairs of public key and signature, with room for one too many.
    pub signatures: Vec<u8, { (MAX_ROOT_SIGNATURES + 1) * ROOT_SIGNATURE }>,
}

impl SealedRoot {
    /// Encodes a root and signs it with each of `keys`, in their order, as often as they are named.
    pub fn of(root: &TrustRoot, keys: &[&SigningKey]) -> Self {
        Self::raw(&encode(root), keys)
    }

    /// Signs bytes whatever they are.
    pub fn raw(body: &[u8], keys: &[&SigningKey]) -> Self {
        let mut signatures = Vec::new();
        for key in keys {
            // What does not fit is left out; the cases that fill it count.
            let _ = signatures.extend_from_slice(&public(key));
            let _ = signatures.extend_from_slice(&sign(Role::Root, key, body));
        }
        Self {
            body: Vec::from_slice(body).unwrap_or_default(),
            signatures,
        }
    }

    /// As the verifier takes it.
    pub fn signed(&self) -> SignedRoot<'_> {
        SignedRoot {
            body: &self.body,
            signatures: &self.signatures,
        }
    }
}

/// postcard bytes; empty if they do not fit.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8, BODY> {
    let mut buffer = [0u8; BODY];
    match postcard::to_slice(value, &mut buffer) {
        Ok(bytes) => Vec::from_slice(bytes).unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

/// The public half of a key.
pub fn public(key: &SigningKey) -> PublicKey {
    key.verifying_key().to_bytes()
}

/// A test key.
pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

/// Everything that is honest, to be spoilt by the cases.
pub struct World {
    /// Root keys, of which two must sign.
    pub root: [SigningKey; 3],
    /// Release key.
    pub release: SigningKey,
    /// Rollout key.
    pub rollout: SigningKey,
    /// A key that nobody believes.
    pub stranger: SigningKey,
    /// The device.
    pub device: DeviceId,
    /// Another device.
    pub other: DeviceId,
    /// The pinned trust root, version 4.
    pub trust: TrustRoot,
    /// Only each so many-th bit or length is tried: 1 tries all, more suits a slow machine.
    pub stride: usize,
}

impl World {
    /// The honest world.
    ///
    /// # Errors
    /// None but of the two device ids, which are legal.
    pub fn new(stride: usize) -> Result<Self, crate::ids::IdError> {
        let root = [key(1), key(2), key(3)];
        let (release, rollout) = (key(4), key(5));
        let mut keys = Keys {
            threshold: 2,
            ..Keys::default()
        };
        // There is room for five.
        let _ = keys.keys.extend_from_slice(&root.each_ref().map(public));
        let trust = TrustRoot {
            version: 4,
            issued_ms: ISSUED_MS,
            expires_ms: ROOT_ENDS_MS,
            root: keys,
            release: public(&release),
            rollout: public(&rollout),
            min_sequence: 0,
        };
        Ok(Self {
            root,
            release,
            rollout,
            stranger: key(9),
            device: "cam1".parse()?,
            other: "cam2".parse()?,
            trust,
            stride: stride.max(1),
        })
    }

    /// The good manifest.
    pub fn manifest(&self) -> Manifest<'static> {
        let mut manifest = Manifest {
            name: "roads",
            sequence: SEQUENCE,
            hardware: HARDWARE,
            abi: RUNTIME_ABI,
            created_ms: ISSUED_MS,
            expires_ms: MANIFEST_ENDS_MS,
            trial: TrialBounds {
                frames: 10,
                max_latency_us: 0,
                min_confidence: 0.0,
            },
            parts: Vec::new(),
            deltas: Vec::new(),
        };
        for (kind, bytes) in PARTS {
            // There is room for eight parts and six deltas.
            let _ = manifest.parts.push(part(kind, bytes));
        }
        let _ = manifest.deltas.push(Delta {
            part: PartKind::Onnx,
            base: Digest::of(BASE),
            codec: 1,
            len: DELTA.len() as u32,
            digest: Digest::of(DELTA),
        });
        manifest
    }

    /// A manifest as the release key signs it.
    pub fn released(&self, manifest: &Manifest<'_>) -> Sealed {
        Sealed::of(Role::Release, &self.release, manifest)
    }

    /// The good offer of a manifest.
    pub fn offer(&self, manifest: &Sealed, sequence: u64) -> Offer {
        Offer {
            device: self.device.clone(),
            manifest: Digest::of(&manifest.body),
            sequence,
            issued_ms: NOW_MS - 1000,
            expires_ms: OFFER_ENDS_MS,
            nonce: 77,
        }
    }

    /// An offer as the rollout key signs it.
    pub fn offered(&self, offer: &Offer) -> Sealed {
        Sealed::of(Role::Rollout, &self.rollout, offer)
    }

    /// A time stamp as the rollout key signs it.
    pub fn stamped(&self, nonce: u64, now_ms: u64) -> Sealed {
        let stamp = TimeStamp {
            device: self.device.clone(),
            nonce,
            now_ms,
        };
        Sealed::of(Role::Time, &self.rollout, &stamp)
    }

    /// The good device, about to judge.
    pub fn judge(&self) -> Judge<'_> {
        Judge {
            trust: &self.trust,
            device: &self.device,
            hardware: HARDWARE,
            floor: FLOOR,
            now_ms: Some(NOW_MS),
        }
    }

    /// What the good device says to a manifest and the good offer of it, signed by the right keys.
    ///
    /// # Errors
    /// The device's.
    pub fn take(&self, manifest: &Manifest<'_>) -> Result<(), TrustError> {
        let sealed = self.released(manifest);
        let offer = self.offered(&self.offer(&sealed, manifest.sequence));
        judged(self.judge().offer(offer.signed(), sealed.signed()))
    }

    /// The root that honestly follows the pinned one.
    pub fn next(&self) -> TrustRoot {
        TrustRoot {
            version: self.trust.version + 1,
            ..self.trust.clone()
        }
    }
}

/// A part of these bytes.
pub fn part(kind: PartKind, bytes: &[u8]) -> Part {
    Part {
        kind,
        len: bytes.len() as u32,
        digest: Digest::of(bytes),
    }
}

/// A verdict without the manifest.
pub fn judged(verdict: Result<Accepted<'_>, TrustError>) -> Result<(), TrustError> {
    verdict.map(|_| ())
}

/// One attack.
#[derive(Clone, Copy)]
pub struct Case {
    /// Name of its test.
    pub name: &'static str,
    /// Its row of the matrix.
    pub row: &'static str,
    /// What a device reports.
    pub expected: TrustError,
    run: fn(&mut Bench<'_>) -> Result<(), Surprise>,
}

impl Case {
    /// Tries all variants; returns how many there were.
    ///
    /// # Errors
    /// The first variant that ended otherwise than it must.
    pub fn run(&self, world: &World) -> Result<u32, Surprise> {
        let mut bench = Bench {
            world,
            expected: self.expected,
            tries: 0,
            refusals: 0,
        };
        (self.run)(&mut bench)?;
        // A case that never saw its own error proves nothing.
        if bench.refusals == 0 {
            return Err(bench.surprise(None));
        }
        Ok(bench.tries)
    }
}

/// A variant that ended otherwise than it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surprise {
    /// Which variant, from 1; 0 if none ended in the expected error.
    pub variant: u32,
    /// What the device said; `None` if it believed.
    pub got: Option<TrustError>,
}

/// Where a case tries its variants.
pub struct Bench<'w> {
    /// The honest world.
    pub world: &'w World,
    expected: TrustError,
    tries: u32,
    refusals: u32,
}

impl Bench<'_> {
    fn surprise(&self, got: Option<TrustError>) -> Surprise {
        Surprise {
            variant: self.tries,
            got,
        }
    }

    /// This must end in the error of the case.
    ///
    /// # Errors
    /// If it does not.
    pub fn refused<T>(&mut self, verdict: Result<T, TrustError>) -> Result<(), Surprise> {
        self.refusals += 1;
        self.refused_as(self.expected, verdict)
    }

    /// This must end in another error.
    ///
    /// # Errors
    /// If it does not.
    pub fn refused_as<T>(
        &mut self,
        error: TrustError,
        verdict: Result<T, TrustError>,
    ) -> Result<(), Surprise> {
        self.tries += 1;
        match verdict {
            Err(got) if got == error => Ok(()),
            Err(got) => Err(self.surprise(Some(got))),
            Ok(_) => Err(self.surprise(None)),
        }
    }

    /// This must be believed.
    ///
    /// # Errors
    /// If it is not.
    pub fn believed<T>(&mut self, verdict: Result<T, TrustError>) -> Result<T, Surprise> {
        self.tries += 1;
        verdict.map_err(|got| self.surprise(Some(got)))
    }

    /// Each so many-th number below `end`, as the world's stride says, the last one included.
    pub fn strided(&self, end: usize) -> impl Iterator<Item = usize> + use<> {
        let stride = self.world.stride;
        (0..end).filter(move |at| at % stride == 0 || at + 1 == end)
    }
}

macro_rules! cases {
    ($($name:ident: $module:ident, $row:literal, $error:ident;)*) => {
        /// Every attack.
        pub const CASES: &[Case] = &[$(Case {
            name: stringify!($name),
            row: $row,
            expected: TrustError::$error,
            run: $module::$name,
        }),*];

        #[cfg(test)]
        mod tests {
            use super::*;

            fn run(name: &str) {
                let case = CASES.iter().find(|case| case.name == name).unwrap();
                let world = World::new(1).unwrap();
                let tries = case.run(&world).unwrap_or_else(|surprise| {
                    panic!("{name}: expected {:?}, variant {} gave {:?}", case.expected, surprise.variant, surprise.got)
                });
                assert!(tries > 0);
            }

            $(#[test] fn $name() { run(stringify!($name)); })*
        }
    };
}

cases! {
    attack_arbitrary_software_bits_of_a_manifest: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_bits_of_an_offer: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_bits_of_a_time_stamp: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_bits_of_a_root: software, "arbitrary software", Threshold;
    attack_arbitrary_software_cut_signature: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_malleable_signature: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_wrong_key: software, "arbitrary software", BadSignature;
    attack_arbitrary_software_weak_key: software, "arbitrary software", BadKey;
    attack_cross_role_replay: software, "cross-role replay", BadSignature;
    attack_wrong_device: software, "wrong software or device", WrongDevice;
    attack_wrong_model: software, "wrong software or device", WrongManifest;
    attack_wrong_hardware: software, "wrong software or device", WrongHardware;
    attack_wrong_abi: software, "wrong software or device", WrongAbi;
    attack_rollback: freshness, "rollback", Rollback;
    attack_rollback_of_the_root: roots, "rollback", OldRoot;
    attack_fast_forward_sequence: freshness, "fast-forward", Rollback;
    attack_fast_forward_time: freshness, "fast-forward", Expired;
    attack_fast_forward_root: roots, "fast-forward", SkippedRoot;
    attack_freeze_expired: freshness, "freeze", Expired;
    attack_freeze_without_clock: freshness, "freeze", NoTime;
    attack_freeze_clock_set_back: freshness, "freeze", Expired;
    attack_freeze_replayed_time: freshness, "freeze", WrongNonce;
    attack_expired_stored_metadata: freshness, "expired stored metadata", RootExpired;
    attack_mix_and_match: bundle, "mix and match", WrongDigest;
    attack_mix_and_match_inconsistent: bundle, "mix and match", Inconsistent;
    attack_partial_bundle: bundle, "partial bundle", Incomplete;
    attack_endless_data: bundle, "endless data", TooLong;
    attack_endless_metadata: bundle, "endless data", TooLarge;
    attack_key_compromise_threshold: roots, "key compromise", Threshold;
    attack_key_compromise_duplicate_keys: roots, "key compromise", DuplicateKey;
    attack_key_compromise_skipped_root: roots, "key compromise", SkippedRoot;
    attack_malicious_mirror: bundle, "malicious mirror, extra files", WrongDigest;
    attack_extra_files: bundle, "malicious mirror, extra files", Unlisted;
    attack_wrong_delta_base: bundle, "wrong delta base", WrongBase;
    attack_swap_after_check: bundle, "swap after check", WrongDigest;
    attack_parser_abuse_trailing_bytes: parser, "parser abuse", Malformed;
    attack_parser_abuse_truncation: parser, "parser abuse", Malformed;
    attack_parser_abuse_long_varints: parser, "parser abuse", NotCanonical;
}
