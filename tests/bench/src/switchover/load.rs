//! The load as a whole: clients of five kinds that keep books, and the audit of their books.
//!
//! Invariant: it is audited after the last client has stopped, through the same proxies.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use super::{Target, Told, audit, client::Clients};

/// Clients at work.
#[derive(Debug)]
pub(crate) struct Load {
    clients: Clients,
    target: Target,
    count: u32,
    began: Instant,
}

impl Load {
    /// Connects `clients` clients to the target's proxies in turn; each pauses for `pace` between two
    /// requests.
    ///
    /// # Errors
    /// When one of them can't connect.
    pub(crate) async fn start(
        target: &Target,
        clients: u32,
        pace: Duration,
    ) -> anyhow::Result<Self> {
        let run_id = uuid::Uuid::now_v7().simple().to_string();
        let started = Clients::start(target, clients, pace, &run_id[24..]).await;
        Ok(Self {
            clients: started.context("start clients")?,
            target: target.clone(),
            count: clients,
            began: Instant::now(),
        })
    }

    /// Stops them and compares what they were told with what the shards hold.
    ///
    /// # Errors
    /// When a client died, or what is there can't be read.
    pub(crate) async fn audit(self) -> anyhow::Result<Told> {
        let ledgers = self.clients.stop().await?;
        let mut told = Told {
            clients: self.count,
            seconds: self.began.elapsed().as_secs_f64(),
            ..Told::default()
        };
        for ledger in &ledgers {
            told.add(ledger);
        }
        audit::audit(&self.target, &ledgers, &mut told)
            .await
            .context("audit what was acknowledged")?;
        Ok(told)
    }
}
