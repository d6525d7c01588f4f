//! One direction of a session behind its handshake: the secret, the key of it, and the number of the
//! next record.
//!
//! Invariants: a number is used once for a key, so no nonce is ever used twice; nothing here is shown
//! by `Debug`, and what holds a secret is wiped when it is dropped.

use std::ops::Range;

use ring::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use zeroize::Zeroizing;

/// Before each record: its type, its version, and its length.
pub(super) const HEADER: usize = 5;
/// Bytes of a record before it is sealed, at most.
pub(super) const PLAIN_MAX: usize = 16 * 1024;
/// What sealing adds, at most (RFC 8446 5.2, RFC 5246 6.2.3 allows more, which no suite here needs).
pub(super) const SEALED_MAX: usize = PLAIN_MAX + 256;
/// AES-GCM is not to seal more records of full size than 2^24.5 with a key (RFC 8446 5.5).
const REKEY_AT: u64 = 1 << 23;
const TAG: usize = 16;
const EXPLICIT: usize = 8;

pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// What a session was agreed to be sealed with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suite {
    /// As IANA numbers it.
    pub(super) number: u16,
    aead: &'static aead::Algorithm,
    /// TLS 1.3 derives keys with it.
    hash: Option<hkdf::Algorithm>,
    /// TLS 1.2 sends half of the nonce along.
    explicit: bool,
}

impl Suite {
    pub(super) fn of(number: u16) -> Option<Self> {
        let (aead, hash, explicit) = match number {
            0x1301 => (&aead::AES_128_GCM, Some(hkdf::HKDF_SHA256), false),
            0x1302 => (&aead::AES_256_GCM, Some(hkdf::HKDF_SHA384), false),
            0x1303 => (&aead::CHACHA20_POLY1305, Some(hkdf::HKDF_SHA256), false),
            0xc02b | 0xc02f => (&aead::AES_128_GCM, None, true),
            0xc02c | 0xc030 => (&aead::AES_256_GCM, None, true),
            0xcca8 | 0xcca9 => (&aead::CHACHA20_POLY1305, None, false),
            _ => return None,
        };
        Some(Self {
            number,
            aead,
            hash,
            explicit,
        })
    }

    pub(super) fn is_13(&self) -> bool {
        self.hash.is_some()
    }

    fn secret_len(&self) -> usize {
        match self.hash {
            Some(hash) => hash.hmac_algorithm().digest_algorithm().output_len(),
            None => self.aead.key_len() + NONCE_LEN,
        }
    }
}

/// A record that is not what it should be, or cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("a record was changed on its way, or is of another session")]
    Forged,
    #[error("a record is larger than TLS allows")]
    Large,
    #[error("a record is not understood")]
    Malformed,
    #[error("a record is out of place")]
    OutOfPlace,
    #[error("the client ended the session with alert {0}")]
    Alert(u8),
    #[error("the client changes its key again and again and does nothing else")]
    Restless,
}

/// See the module.
pub(super) struct Direction {
    suite: Suite,
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    /// TLS 1.3: the traffic secret. TLS 1.2: key and nonce.
    secret: Zeroizing<Vec<u8>>,
    seq: u64,
}

impl std::fmt::Debug for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Direction");
        shown.field("suite", &self.suite.number);
        shown.field("seq", &self.seq).finish_non_exhaustive()
    }
}

/// The length of what is derived.
struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label of RFC 8446 7.1, without a context.
fn expand(
    hash: hkdf::Algorithm,
    secret: &[u8],
    label: &[u8],
    out: &mut [u8],
) -> Result<(), ring::error::Unspecified> {
    const PREFIX: &[u8] = b"tls13 ";
    let len = (out.len() as u16).to_be_bytes();
    let label_len = [(PREFIX.len() + label.len()) as u8];
    let info: [&[u8]; 5] = [&len, &label_len, PREFIX, label, &[0]];
    let secret = hkdf::Prk::new_less_safe(hash, secret);
    secret.expand(&info, Len(out.len()))?.fill(out)
}

impl Direction {
    /// `None`: no session of this suite has such a secret.
    pub(super) fn new(suite: Suite, secret: Zeroizing<Vec<u8>>, seq: u64) -> Option<Self> {
        if secret.len() != suite.secret_len() {
            return None;
        }
        let mut key = Zeroizing::new([0; 32]);
        let key = &mut key[..suite.aead.key_len()];
        let mut iv = [0; NONCE_LEN];
        match suite.hash {
            Some(hash) => {
                expand(hash, &secret, b"key", key).ok()?;
                expand(hash, &secret, b"iv", &mut iv).ok()?;
            }
            None => {
                let (of_key, of_iv) = secret.split_at(key.len());
                key.copy_from_slice(of_key);
                iv.copy_from_slice(of_iv);
            }
        }
        let key = LessSafeKey::new(UnboundKey::new(suite.aead, key).ok()?);
        Some(Self {
            suite,
            key,
            iv,
            secret,
            seq,
        })
    }

    pub(super) fn suite(&self) -> Suite {
        self.suite
    }

    pub(super) fn secret(&self) -> &[u8] {
        &self.secret
    }

    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    /// The next key of a TLS 1.3 session (RFC 8446 7.2). False: it has none.
    pub(super) fn change_key(&mut self) -> bool {
        let Some(hash) = self.suite.hash else {
            return false;
        };
        let mut next = Zeroizing::new(vec![0; self.secret.len()]);
        if expand(hash, &self.secret, b"traffic upd", &mut next).is_err() {
            return false;
        }
        let Some(next) = Self::new(self.suite, next, 0) else {
            return false;
        };
        *self = next;
        true
    }

    /// The key has sealed as much as one may.
    pub(super) fn is_worn(&self) -> bool {
        self.suite.is_13() && self.seq >= REKEY_AT
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        let seq = self.seq.to_be_bytes();
        for (byte, of_seq) in nonce[NONCE_LEN - seq.len()..].iter_mut().zip(seq) {
            *byte ^= of_seq;
        }
        nonce
    }

    /// What TLS 1.2 protects beside the content.
    fn aad_12(&self, kind: u8, len: usize) -> [u8; 13] {
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&self.seq.to_be_bytes());
        aad[8..11].copy_from_slice(&[kind, 3, 3]);
        aad[11..].copy_from_slice(&(len as u16).to_be_bytes());
        aad
    }

    /// Appends a sealed record of this type. At most [`PLAIN_MAX`] bytes.
    ///
    /// # Errors
    /// Another record would repeat a nonce.
    pub(super) fn seal(&mut self, kind: u8, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        let next = self.seq.checked_add(1).ok_or(Broken::OutOfPlace)?;
        let is_13 = self.suite.is_13();
        let explicit = if self.suite.explicit { EXPLICIT } else { 0 };
        let len = explicit + plain.len() + usize::from(is_13) + TAG;
        let header_kind = if is_13 { DATA } else { kind };
        let [high, low] = (len as u16).to_be_bytes();
        let header = [header_kind, 3, 3, high, low];
        let nonce = self.nonce();
        out.reserve(HEADER + len);
        out.extend_from_slice(&header);
        if self.suite.explicit {
            out.extend_from_slice(&nonce[NONCE_LEN - EXPLICIT..]);
        }
        let begin = out.len();
        out.extend_from_slice(plain);
        if is_13 {
            out.push(kind);
        }
        let nonce = Nonce::assume_unique_for_key(nonce);
        let content = &mut out[begin..];
        let tag = match is_13 {
            true => self
                .key
                .seal_in_place_separate_tag(nonce, Aad::from(header), content),
            false => {
                let aad = Aad::from(self.aad_12(kind, plain.len()));
                self.key.seal_in_place_separate_tag(nonce, aad, content)
            }
        };
        out.extend_from_slice(tag.map_err(|_| Broken::Large)?.as_ref());
        self.seq = next;
        Ok(())
    }

    /// Opens a record in place: its type, and where in `record` the content is.
    ///
    /// # Errors
    /// It is not of this session, or not the next one.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Broken> {
        let next = self.seq.checked_add(1).ok_or(Broken::OutOfPlace)?;
        let mut header = [0; HEADER];
        header.copy_from_slice(&record[..HEADER]);
        let kind = header[0];
        let begin = HEADER + if self.suite.explicit { EXPLICIT } else { 0 };
        let Some(len) = (record.len() - HEADER).checked_sub(begin - HEADER + TAG) else {
            return Err(Broken::Malformed);
        };
        let opened = if self.suite.is_13() {
            if kind != DATA {
                return Err(Broken::OutOfPlace);
            }
            let nonce = Nonce::assume_unique_for_key(self.nonce());
            self.key
                .open_in_place(nonce, Aad::from(header), &mut record[begin..])
        } else {
            let mut nonce = self.nonce();
            if self.suite.explicit {
                nonce[NONCE_LEN - EXPLICIT..].copy_from_slice(&record[HEADER..begin]);
            }
            let nonce = Nonce::assume_unique_for_key(nonce);
            let aad = Aad::from(self.aad_12(kind, len));
            self.key.open_in_place(nonce, aad, &mut record[begin..])
        };
        let content = opened.map_err(|_| Broken::Forged)?;
        self.seq = next;
        let (kind, len) = match self.suite.is_13() {
            false => (kind, len),
            // Behind the content its type, then zeros.
            true => match content.iter().rposition(|byte| *byte != 0) {
                Some(at) => (content[at], at),
                None => return Err(Broken::OutOfPlace),
            },
        };
        if len > PLAIN_MAX {
            return Err(Broken::Large);
        }
        Ok((kind, begin..begin + len))
    }
}
