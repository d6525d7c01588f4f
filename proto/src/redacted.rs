//! Messages that hold keys: they are shown without them, and wiped when they are dropped.

use std::fmt;

use zeroize::Zeroize as _;

use crate::handover::v1::Tls;

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("suite", &self.suite)
            .finish_non_exhaustive()
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.rx_secret.zeroize();
        self.tx_secret.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::v1::{Batch, Client};

    #[test]
    fn a_batch_that_is_shown_shows_no_key() {
        let tls = Tls {
            suite: 0x1301,
            rx_secret: b"SECRET".to_vec(),
            rx_sequence: 0,
            tx_secret: b"SECRET".to_vec(),
            tx_sequence: 0,
            input: Vec::new(),
            output: Vec::new(),
        };
        let client = Client {
            tls: Some(tls),
            ..Client::default()
        };
        let batch = Batch {
            number: 1,
            clients: vec![client],
            announced: false,
        };
        let shown = format!("{batch:?} {batch:#?}");
        assert!(shown.contains("Tls { suite: 4865, .. }"), "{shown}");
        // Bytes are shown as numbers.
        assert!(!shown.contains("83, 69, 67"), "{shown}");
        assert!(!shown.contains("SECRET"), "{shown}");
    }
}
