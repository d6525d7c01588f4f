//! The active clients: so many of each kind, and those that feed them.
//!
//! Invariant: a client makes its connection once. When something is wrong with it that can't be counted
//! and gone on from, it is out, and not intact.

mod askers;
mod feeders;
mod listeners;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use rand::Rng as _;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    book::{Book, Books, Kind},
    wire::{Wire, shown},
};

/// For the last messages, and then for whatever still waits.
const END_LIMIT: Duration = Duration::from_secs(15);
/// Of each kind, in a thousand active clients.
const SHARES: [(Kind, usize); 7] = [
    (Kind::Pipelined, 400),
    (Kind::Multi, 200),
    (Kind::Watch, 150),
    (Kind::Blocked, 150),
    (Kind::Subscribed, 86),
    (Kind::Tracking, 10),
    (Kind::Monitor, 4),
];
/// Topics of messages, of each of two kinds.
const TOPICS: usize = 8;
/// Lists that one client pushes to.
const LISTS_PER_PUSHER: usize = 50;

/// What is asked of the active clients.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) address: String,
    /// Where those connect that feed others, or look after them.
    pub(super) others_at: String,
    pub(super) active: usize,
    /// Of a client, between two rounds of what it does.
    pub(super) pace: Duration,
    pub(super) messages_per_second: u64,
}

/// What a client needs to know of the run.
#[derive(Debug, Clone)]
struct Berth {
    kind: Kind,
    number: usize,
    address: String,
    others_at: String,
    pace: Duration,
    book: Book,
    stop: CancellationToken,
    give_up: CancellationToken,
}

impl Berth {
    /// Waits for about this long; false: the run is over.
    async fn goes_on(&self, pace: Duration) -> bool {
        if !pace.is_zero() {
            let pace = pace.mul_f64(rand::rng().random_range(0.75..1.25));
            tokio::select! {
                () = sleep(pace) => {}
                () = self.stop.cancelled() => {}
            }
        }
        !self.stop.is_cancelled()
    }
}

/// What a feeder sends is over with this number; 0: it goes on.
#[derive(Debug, Clone, Default)]
struct Feed(Arc<AtomicU64>);

impl Feed {
    fn ends_with(&self, number: u64) {
        self.0.store(number, Ordering::Release);
    }

    fn last(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn is_last(&self, number: u64) -> bool {
        self.last() == number
    }
}

/// What a client does.
#[derive(Debug, Clone)]
enum Work {
    Pipelined,
    Multi,
    Watch,
    Blocked(Feed),
    Subscribed(Feed),
    Monitor(Feed),
    Tracking(Feed),
    Push(Feed, Vec<usize>),
    Publish(Feed, Vec<String>, u64),
    Mark(Feed),
}

/// All active clients.
#[derive(Debug)]
pub(super) struct Crew {
    running: JoinSet<()>,
    stop: CancellationToken,
    give_up: CancellationToken,
}

impl Crew {
    /// Connects all of them, then lets them work.
    ///
    /// # Errors
    /// When one can't connect, or is refused what it wants.
    pub(super) async fn start(plan: &Plan, books: &Books) -> anyhow::Result<Self> {
        let mut crew = Self {
            running: JoinSet::new(),
            stop: CancellationToken::new(),
            give_up: CancellationToken::new(),
        };
        let go = Arc::new(Semaphore::new(0));
        for (number, (kind, work)) in works(plan).into_iter().enumerate() {
            let berth = Berth {
                kind,
                number,
                address: plan.address.clone(),
                others_at: plan.others_at.clone(),
                pace: plan.pace,
                book: books.of(kind),
                stop: crew.stop.clone(),
                give_up: crew.give_up.clone(),
            };
            let (wire, id) = connect(&berth, &work)
                .await
                .with_context(|| format!("client {number}, {}", kind.name()))?;
            berth.book.connected();
            let go = Arc::clone(&go);
            crew.running.spawn(async move {
                let _go = go.acquire().await;
                drop(_go);
                client(berth, work, wire, id).await;
            });
        }
        let newcomers =
            askers::newcomers(plan.address.clone(), books.of(Kind::New), crew.stop.clone());
        crew.running.spawn(newcomers);
        go.add_permits(Semaphore::MAX_PERMITS);
        Ok(crew)
    }

    /// Ends them: first those that ask and feed, then, when they have heard the last, those that listen.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        let all = async { while self.running.join_next().await.is_some() {} };
        if timeout(END_LIMIT, all).await.is_err() {
            self.give_up.cancel();
            // Nothing waits any longer than for a reply.
            let rest = async { while self.running.join_next().await.is_some() {} };
            let _ = timeout(super::wire::REPLY_LIMIT * 2, rest).await;
        }
    }
}

/// What each client does; listeners first, so that they hear from the begin.
fn works(plan: &Plan) -> Vec<(Kind, Work)> {
    let (messages, marks) = (Feed::default(), Feed::default());
    let mut works = Vec::new();
    let mut lists = Vec::new();
    for (kind, share) in SHARES.into_iter().rev() {
        for _ in 0..(plan.active * share / 1000).max(1) {
            let work = match kind {
                Kind::Multi => Work::Multi,
                Kind::Watch => Work::Watch,
                Kind::Blocked => {
                    lists.push(works.len());
                    // The number of its pusher is not known yet.
                    Work::Blocked(Feed::default())
                }
                Kind::Subscribed => Work::Subscribed(messages.clone()),
                Kind::Tracking => Work::Tracking(marks.clone()),
                Kind::Monitor => Work::Monitor(marks.clone()),
                _ => Work::Pipelined,
            };
            works.push((kind, work));
        }
    }
    for lists in lists.chunks(LISTS_PER_PUSHER) {
        let feed = Feed::default();
        for list in lists {
            works[*list].1 = Work::Blocked(feed.clone());
        }
        works.push((Kind::Plain, Work::Push(feed, lists.to_vec())));
    }
    works.push((Kind::Plain, Work::Mark(marks)));
    let topics = (0..TOPICS).map(|n| format!("PUBLISH pu:topic:{n}"));
    let shard_topics = (0..TOPICS).map(|n| format!("SPUBLISH pu:shard-topic:{n}"));
    let topics = topics.chain(shard_topics).collect();
    let publish = Work::Publish(messages, topics, plan.messages_per_second);
    works.push((Kind::Plain, publish));
    works
}

/// Its connection in the state that it works in, and its name there if it can be asked for it later.
async fn connect(berth: &Berth, work: &Work) -> anyhow::Result<(Wire, Option<String>)> {
    let number = berth.number;
    let address = match work {
        Work::Push(..) | Work::Publish(..) | Work::Mark(_) => &berth.others_at,
        _ => &berth.address,
    };
    let resp3 = match work {
        Work::Tracking(_) => true,
        Work::Subscribed(_) => number % 2 == 1,
        _ => false,
    };
    let mut wire = match resp3 {
        true => Wire::connect_resp3(address).await?,
        false => Wire::connect(address).await?,
    };
    let id = wire.id().await?;
    match work {
        Work::Tracking(_) => wire.expect("CLIENT TRACKING ON", "+OK\r\n").await?,
        Work::Monitor(_) => {
            wire.expect("MONITOR", "+OK\r\n").await?;
            return Ok((wire, None));
        }
        Work::Subscribed(_) => {
            let topic = number / 3 % TOPICS;
            let line = match number % 3 {
                0 => format!("SUBSCRIBE pu:topic:{topic}"),
                1 => format!("PSUBSCRIBE pu:t[o]pic:{topic}"),
                _ => format!("SSUBSCRIBE pu:shard-topic:{topic}"),
            };
            let answer = wire.ask(&line).await?;
            anyhow::ensure!(answer.contains("subscribe"), "{line}: {}", shown(&answer));
            return Ok((wire, resp3.then_some(id)));
        }
        _ => {}
    }
    Ok((wire, Some(id)))
}

/// Works to the end, and says then whether its connection is what it was.
async fn client(berth: Berth, work: Work, mut wire: Wire, id: Option<String>) {
    let wire = &mut wire;
    let worked = match &work {
        Work::Pipelined => askers::pipelined(&berth, wire).await,
        Work::Multi => askers::multi(&berth, wire).await,
        Work::Watch => askers::watch(&berth, wire).await,
        Work::Blocked(feed) => listeners::blocked(&berth, feed, wire).await,
        Work::Subscribed(feed) => listeners::subscribed(&berth, feed, wire).await,
        Work::Monitor(feed) => listeners::monitor(&berth, feed, wire).await,
        Work::Tracking(feed) => listeners::tracking(&berth, feed, wire).await,
        Work::Push(feed, lists) => feeders::pusher(&berth, feed, lists, wire).await,
        Work::Publish(feed, topics, rate) => {
            feeders::publisher(&berth, feed, topics, *rate, wire).await
        }
        Work::Mark(feed) => feeders::marker(&berth, feed, wire).await,
    };
    let same = match (worked, id) {
        (Ok(()), Some(id)) => is_called(wire, &id).await,
        (worked, _) => worked,
    };
    match same {
        Ok(()) => berth.book.intact(),
        Err(error) => berth.book.out(berth.number, &error),
    }
}

async fn is_called(wire: &mut Wire, id: &str) -> anyhow::Result<()> {
    let mut now = wire.ask("CLIENT ID").await?;
    // What it was told of before it asked.
    while now.starts_with('>') {
        now = wire.hear().await?;
    }
    anyhow::ensure!(
        now == id,
        "it is called {} now, and was {}",
        shown(&now),
        id.trim_end()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_there_and_every_list_is_fed_once() {
        for active in [1, 20, 1_000] {
            let plan = Plan {
                address: String::new(),
                others_at: String::new(),
                active,
                pace: Duration::ZERO,
                messages_per_second: 1,
            };
            let works = works(&plan);
            for (kind, _) in SHARES {
                assert!(
                    works.iter().any(|(k, _)| *k == kind),
                    "{kind:?} of {active}"
                );
            }
            let mut fed: Vec<usize> = Vec::new();
            for (_, work) in &works {
                if let Work::Push(_, lists) = work {
                    fed.extend(lists);
                }
            }
            let blocked = works.iter().enumerate();
            let blocked = blocked.filter(|(_, (kind, _))| *kind == Kind::Blocked);
            assert_eq!(fed, blocked.map(|(at, _)| at).collect::<Vec<_>>());
        }
    }
}
