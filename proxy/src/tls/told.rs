//! How the TLS of a client is told to another process, between two bytes of its connection.
//!
//! Invariant: what is read back seals and opens the very next record of the connection; what cannot be
//! read makes the client stay.

use std::sync::Arc;

use slotmesh_proto::handover::v1 as pb;
use zeroize::Zeroizing;

use super::Port;
use super::records::Records;
use super::secrets::{Direction, HEADER, SEALED_MAX, Suite};
use super::socket::{Stage, Tls};

/// A process that knows less cannot take clients with TLS.
pub(crate) const SCHEMA: u32 = 6;

impl Tls {
    /// Bytes that its written form takes, as good as.
    pub(crate) fn bytes_len(&self) -> usize {
        /// Secrets and numbers.
        const SESSION_BYTES: usize = 160;
        let partial = match &self.stage {
            Stage::Open(records) => records.partial.len(),
            _ => 0,
        };
        SESSION_BYTES + partial + self.out.len() - self.sent
    }

    /// The written form. `None`: it has none, and must not travel.
    pub(crate) fn to_message(&self) -> Option<pb::Tls> {
        match &self.stage {
            Stage::Unsaid(_) => Some(pb::Tls::default()),
            Stage::Open(records) => Some(pb::Tls {
                suite: u32::from(records.rx.suite().number),
                rx_secret: records.rx.secret().to_vec(),
                rx_sequence: records.rx.seq(),
                tx_secret: records.tx.secret().to_vec(),
                tx_sequence: records.tx.seq(),
                input: records.partial.clone(),
                output: self.out[self.sent..].to_vec(),
            }),
            Stage::Greeting(_) | Stage::Ended => None,
        }
    }

    /// Reads the written form. `port` is for who has said nothing yet. `None`: it is not understood;
    /// `Some(None)`: it is a client without TLS.
    pub(crate) fn read_message(
        told: Option<pb::Tls>,
        port: Option<&Arc<Port>>,
    ) -> Option<Option<Box<Self>>> {
        let Some(mut told) = told else {
            return Some(None);
        };
        if told.suite == 0 {
            return Some(port.map(Self::unsaid));
        }
        let suite = Suite::of(u16::try_from(told.suite).ok()?)?;
        let direction = |secret: &mut Vec<u8>, seq| {
            let secret = Zeroizing::new(std::mem::take(secret));
            Direction::new(suite, secret, seq)
        };
        let rx = direction(&mut told.rx_secret, told.rx_sequence)?;
        let tx = direction(&mut told.tx_secret, told.tx_sequence)?;
        if told.input.len() > HEADER + SEALED_MAX {
            return None;
        }
        let mut records = Records::new(rx, tx);
        records.partial = std::mem::take(&mut told.input);
        let mut tls = Self::of(Stage::Open(Box::new(records)));
        tls.out = std::mem::take(&mut told.output);
        Some(Some(Box::new(tls)))
    }
}
