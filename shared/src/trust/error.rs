//! Why something is not believed: one number for each reason, the same on devices and servers.

use core::fmt;

use crate::canonical::CanonicalError;

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $words:literal;)*) => {
        /// Why something is not believed. The numbers are reported by devices and never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum TrustError {
            $($(#[$doc])* $name = $code,)*
        }

        impl TrustError {
            /// Every error, by rising number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The reason in words.
            pub fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)*
                }
            }
        }
    };
}

errors! {
    /// A signed body, or the list of signatures, exceeds its cap; it is refused unread.
    TooLarge = 1, "the signed body is too large";
    /// The public key is not a key, is weak, or is spelled in a second way.
    BadKey = 2, "the public key is invalid or weak";
    /// The signature is not this role's over this body.
    BadSignature = 3, "the signature does not match";
    /// The body does not decode.
    Malformed = 4, "the signed body does not decode";
    /// The body decodes but is not spelled canonically.
    NotCanonical = 5, "the signed body is not in canonical form";
    /// Past its expiry.
    Expired = 6, "it has expired";
    /// An offer or a time stamp for another device.
    WrongDevice = 7, "the offer is for another device";
    /// A model for other hardware.
    WrongHardware = 8, "the model is for other hardware";
    /// A model for another runtime.
    WrongAbi = 9, "the model is for another runtime version";
    /// Not newer than what the device has confirmed.
    Rollback = 10, "it is not newer than the confirmed model";
    /// The offer names another manifest.
    WrongManifest = 11, "the offer names another manifest";
    /// Bytes do not have the digest or length that was signed.
    WrongDigest = 12, "the bytes do not have the signed digest or length";
    /// Too few distinct root keys signed a trust root, or its threshold can't be met.
    Threshold = 13, "too few distinct root keys have signed the trust root";
    /// A trust root that is not newer than the stored one.
    OldRoot = 14, "the trust root is not newer than the stored one";
    /// A trust root that leaves versions out.
    SkippedRoot = 15, "the trust root skips a version";
    /// One key stands in a trust root twice, in one role or in two.
    DuplicateKey = 16, "the trust root names one key twice";
    /// The stored trust root is past its expiry; only a newer one is accepted.
    RootExpired = 17, "the trust root has expired; publish a newer one";
    /// The device knows no time that it may rely on.
    NoTime = 18, "the device has no attested time yet";
    /// A time stamp that answers another question.
    WrongNonce = 19, "the time stamp answers another question";
    /// More bytes than were signed.
    TooLong = 20, "more bytes arrived than were signed";
    /// Bytes come slower than the least rate, or not before the deadline.
    TooSlow = 21, "the bytes come too slowly";
    /// A delta against a part that the device does not have.
    WrongBase = 22, "the delta is against another base";
    /// Bytes that the manifest does not list.
    Unlisted = 23, "the manifest does not list it";
    /// A package with a part missing or cut short.
    Incomplete = 24, "the package is not complete";
    /// A manifest that lists one part twice, or a delta that makes none of its parts.
    Inconsistent = 25, "the manifest contradicts itself";
    /// A model whose release key is no longer believed.
    Revoked = 26, "the key that signed it is no longer believed";
}

impl TrustError {
    /// The number that devices report.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// The error with a number.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|error| error.code() == code)
    }

    /// Whether a fresh offer, signed time or a newer trust root may cure it, so that the device
    /// asks before it gives an answer and a refusal does not count against the model.
    pub fn is_curable(self) -> bool {
        matches!(self, Self::Expired | Self::NoTime | Self::RootExpired)
    }
}

impl fmt::Display for TrustError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

impl core::error::Error for TrustError {}

impl From<CanonicalError> for TrustError {
    fn from(error: CanonicalError) -> Self {
        match error {
            CanonicalError::Malformed => Self::Malformed,
            CanonicalError::NotCanonical => Self::NotCanonical,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_and_stay_below_those_of_the_slot() {
        for (at, error) in TrustError::ALL.iter().enumerate() {
            assert_eq!(usize::from(error.code()), at + 1);
            assert!(error.code() < 100);
            assert_eq!(TrustError::from_code(error.code()), Some(*error));
        }
        assert_eq!(TrustError::from_code(0), None);
    }
}
