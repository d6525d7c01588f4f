//! Free ports of the loopback address.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::Context;

/// A port that was free a moment ago. Whoever uses it must be ready to try another one.
///
/// # Errors
/// When the machine has none.
pub fn free() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr().context("read the free port")?.port())
}
