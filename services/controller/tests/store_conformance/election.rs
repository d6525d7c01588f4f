//! What the election promises on every store: a leader soon, terms that rise, and writes that
//! a deposed leader cannot make.

use std::{sync::Arc, time::Duration};

use slotmesh_controller::{
    leader::{Candidate, Election, LeaderOutcome, Leadership, Term},
    store::{MIN_LEASE_TTL, Store, Txn, keys::Key},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::suite::{commit, get, soon};

pub(crate) async fn run(store: Arc<dyn Store>) {
    one_leads_and_the_other_knows_where(&store).await;
    who_resigns_is_followed_at_once(&store).await;
    a_leader_whose_key_is_gone_stops_and_writes_nothing(&store).await;
    a_conflict_is_told_from_the_end_of_the_term(&store).await;
}

struct Controller {
    election: Election,
    leadership: watch::Receiver<Leadership>,
    shutdown: CancellationToken,
}

impl Controller {
    fn start(store: &Arc<dyn Store>, id: &str) -> Self {
        let shutdown = CancellationToken::new();
        let candidate = Candidate {
            controller_id: id.into(),
            address: format!("{id}:7"),
            ttl: MIN_LEASE_TTL,
        };
        let election = Election::start(store.clone(), candidate, shutdown.clone());
        Self {
            leadership: election.leadership(),
            election,
            shutdown,
        }
    }

    async fn leads(&mut self) -> Term {
        let leads = self.leadership.wait_for(|l| l.term().is_some());
        soon("this controller to lead", leads)
            .await
            .unwrap()
            .term()
            .unwrap()
    }

    async fn follows(&mut self, address: &str) {
        let knows = |l: &Leadership| l.leader().is_some_and(|l| l.address == address);
        soon("this controller to follow", self.leadership.wait_for(knows))
            .await
            .unwrap();
    }

    async fn stop(self) {
        self.shutdown.cancel();
        soon("the candidacy to end", self.election.join()).await;
    }
}

async fn one_leads_and_the_other_knows_where(store: &Arc<dyn Store>) {
    let mut a = Controller::start(store, "a");
    let term = a.leads().await;
    let key = get(store, &Key::Leader.to_string()).await.unwrap();
    assert_eq!(key.create_revision, term.number());
    let mut b = Controller::start(store, "b");
    b.follows("a:7").await;
    assert_eq!(
        a.leadership.borrow().term(),
        Some(term),
        "a candidate disturbs no leader"
    );
    b.stop().await;
    a.stop().await;
}

async fn who_resigns_is_followed_at_once(store: &Arc<dyn Store>) {
    let mut a = Controller::start(store, "a");
    let first = a.leads().await;
    let mut b = Controller::start(store, "b");
    b.follows("a:7").await;
    let resigned = Instant::now();
    a.stop().await;
    let second = b.leads().await;
    assert!(second > first, "{second} after {first}");
    assert!(
        resigned.elapsed() < MIN_LEASE_TTL,
        "nobody waited for the lease to run out"
    );
    b.stop().await;
    assert_eq!(
        get(store, &Key::Leader.to_string()).await,
        None,
        "who ends gives the key back"
    );
}

async fn a_leader_whose_key_is_gone_stops_and_writes_nothing(store: &Arc<dyn Store>) {
    let mut a = Controller::start(store, "a");
    let old = a.leads().await;
    commit(store, Txn::new().delete(Key::Leader)).await;
    let late = old
        .txn()
        .put("/election/late", "x")
        .commit(&**store)
        .await
        .unwrap();
    assert_eq!(late, LeaderOutcome::Deposed);
    assert_eq!(get(store, "/election/late").await, None);
    soon(
        "the leader to notice",
        a.leadership.wait_for(|l| l.term() != Some(old)),
    )
    .await
    .unwrap();
    let new = a.leads().await;
    assert!(new > old);
    let late = old
        .txn()
        .put("/election/late", "x")
        .commit(&**store)
        .await
        .unwrap();
    assert_eq!(
        late,
        LeaderOutcome::Deposed,
        "an old term does not come back with its owner"
    );
    a.stop().await;
}

async fn a_conflict_is_told_from_the_end_of_the_term(store: &Arc<dyn Store>) {
    let mut a = Controller::start(store, "a");
    let term = a.leads().await;
    let create = || term.txn().absent("/election/x").put("/election/x", "1");
    let first = create().commit(&**store).await.unwrap();
    assert!(matches!(first, LeaderOutcome::Committed { .. }));
    assert_eq!(
        create().commit(&**store).await.unwrap(),
        LeaderOutcome::Conflict
    );
    a.stop().await;
    let over = term
        .txn()
        .put("/election/x", "2")
        .commit(&**store)
        .await
        .unwrap();
    assert_eq!(over, LeaderOutcome::Deposed);
}

/// `cut` separates the first controller from its store, as a dead process or a dead link would.
pub(crate) async fn a_silent_leader_stops_before_another_leads(
    store: &Arc<dyn Store>,
    its_own: Arc<dyn Store>,
    cut: impl FnOnce(),
) {
    let mut a = Controller::start(&its_own, "a");
    let old = a.leads().await;
    let mut b = Controller::start(store, "b");
    b.follows("a:7").await;
    let silent = Instant::now();
    cut();
    let (a_ended, (b_began, new)) = tokio::join!(
        async {
            let ended = a.leadership.wait_for(|l| l.term().is_none());
            soon("the silent leader to stop", ended).await.unwrap();
            Instant::now()
        },
        async {
            let term = b.leads().await;
            (Instant::now(), term)
        }
    );
    assert!(
        a_ended < b_began,
        "two led at once, for {:?}",
        a_ended - b_began
    );
    assert!(a_ended - silent < MIN_LEASE_TTL);
    assert!(
        b_began - silent < MIN_LEASE_TTL + Duration::from_secs(3),
        "{:?}",
        b_began - silent
    );
    assert!(new > old);
    let late = old
        .txn()
        .put("/election/late", "x")
        .commit(&**store)
        .await
        .unwrap();
    assert_eq!(late, LeaderOutcome::Deposed);
    b.stop().await;
    a.stop().await;
}
