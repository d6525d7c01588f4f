//! A watch on etcd that outlives its streams.
//!
//! Invariant: `next` is one more than the last revision handed out or known to hold nothing for
//! us, so a new stream from it neither loses nor repeats anything.

use std::{collections::VecDeque, fmt, time::Duration};

use async_trait::async_trait;
use etcd_client::{EventType, WatchClient, WatchOptions, WatchResponse, WatchStream};
use tokio::time::sleep;
use tracing::debug;

use super::{call, item, signed, unsigned};
use crate::store::{Event, Source, StoreError, WatchEvents, WatchSource};

/// etcd catches a watch up in messages of up to 1,000 revisions. One that is larger than this is
/// as good as a compaction: listing again is cheaper than what we would read.
pub(super) const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;
/// Streams lost in a row before the caller hears of it; with the pauses below, about 5 s, or
/// longer when each attempt runs into its deadline.
const MAX_FAILURES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct EtcdWatch {
    client: WatchClient,
    prefix: String,
    next: u64,
    stream: Option<WatchStream>,
    ready: VecDeque<WatchEvents>,
    failures: u32,
}

impl fmt::Debug for EtcdWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdWatch")
            .field("prefix", &self.prefix)
            .field("next", &self.next)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}

impl EtcdWatch {
    pub(super) async fn open(
        client: WatchClient,
        prefix: &str,
        from_revision: u64,
    ) -> Result<Self, StoreError> {
        let prefix = prefix.to_owned();
        let (stream, ready) = (None, VecDeque::new());
        let mut watch = Self {
            client,
            prefix,
            next: from_revision,
            stream,
            ready,
            failures: 0,
        };
        watch.stream = Some(watch.connect().await?);
        Ok(watch)
    }

    async fn connect(&self) -> Result<WatchStream, StoreError> {
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(signed(self.next))
            .with_progress_notify();
        let mut client = self.client.clone();
        call("watch", client.watch(self.prefix.as_str(), Some(options))).await
    }

    /// The stream is lost: the next one starts at `next`.
    fn lost(&mut self, source: Option<Source>) -> Result<(), StoreError> {
        debug!(prefix = %self.prefix, next = self.next, reason = ?source, "watch stream lost");
        self.stream = None;
        self.failures += 1;
        if self.failures < MAX_FAILURES {
            return Ok(());
        }
        // Whoever asks again gets as many attempts again.
        self.failures = 0;
        Err(StoreError::Unavailable {
            doing: "watch",
            source,
        })
    }

    fn take(&mut self, message: WatchResponse) -> Result<(), StoreError> {
        if message.canceled() {
            if message.compact_revision() > 0 {
                let revision = unsigned(message.compact_revision());
                return Err(StoreError::Compacted { revision });
            }
            return self.lost(Some(message.cancel_reason().to_owned().into()));
        }
        if message.created() {
            return Ok(());
        }
        self.failures = 0;
        for event in message.events() {
            let Some(found) = event.kv() else { continue };
            let found = item(found.clone())?;
            let revision = found.mod_revision;
            if revision < self.next {
                continue;
            }
            let event = match event.event_type() {
                EventType::Put => Event::Put(found),
                EventType::Delete => Event::Delete { key: found.key },
            };
            match self.ready.back_mut() {
                Some(last) if last.revision == revision => last.events.push(event),
                _ => self.ready.push_back(WatchEvents {
                    revision,
                    events: vec![event],
                }),
            }
        }
        // A message ends with a whole revision: etcd splits them only when asked to. One without
        // events says how far there was nothing for us.
        let seen = match self.ready.back() {
            Some(last) => last.revision,
            None => message
                .header()
                .map_or(0, |header| unsigned(header.revision())),
        };
        self.next = self.next.max(seen + 1);
        Ok(())
    }
}

#[async_trait]
impl WatchSource for EtcdWatch {
    async fn next(&mut self) -> Result<WatchEvents, StoreError> {
        loop {
            if let Some(events) = self.ready.pop_front() {
                return Ok(events);
            }
            let Some(stream) = &mut self.stream else {
                if self.failures > 0 {
                    sleep((FIRST_PAUSE * 2u32.pow(self.failures.min(6))).min(MAX_PAUSE)).await;
                }
                match self.connect().await {
                    Ok(stream) => self.stream = Some(stream),
                    Err(StoreError::Unavailable { source, .. }) => self.lost(source)?,
                    Err(error) => return Err(error),
                }
                continue;
            };
            match stream.message().await {
                Ok(Some(message)) => self.take(message)?,
                Ok(None) => self.lost(None)?,
                Err(etcd_client::Error::GRpcStatus(status))
                    if status.code() == tonic::Code::OutOfRange =>
                {
                    self.stream = None;
                    return Err(StoreError::Compacted {
                        revision: self.next,
                    });
                }
                Err(error) => self.lost(Some(Box::new(error)))?,
            }
        }
    }
}
