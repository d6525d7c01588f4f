//! A controller that says what a test wants and keeps what the proxy answers.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::topology_service_server::{
    TopologyService, TopologyServiceServer,
};
use slotmesh_proto::topology::v1::watch_request::Message as Said;
use slotmesh_proto::topology::v1::watch_response::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::wait_for;

#[derive(Default)]
struct State {
    streams: Vec<mpsc::Sender<Result<pb::WatchResponse, Status>>>,
    heard: Vec<Said>,
    snapshot: pb::Snapshot,
    nonce: u64,
}

#[derive(Clone, Default)]
pub(crate) struct Controller {
    state: Arc<Mutex<State>>,
}

impl Controller {
    /// Serves; each new stream begins with the snapshot.
    pub(crate) async fn start(snapshot: pb::Snapshot) -> (Self, SocketAddr) {
        let controller = Self::default();
        controller.state.lock().unwrap().snapshot = snapshot;
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let service = TopologyServiceServer::new(controller.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(socket)),
        );
        (controller, address)
    }

    pub(crate) fn say(&self, message: Message) {
        let mut state = self.state.lock().unwrap();
        state.nonce += 1;
        let response = pb::WatchResponse {
            nonce: state.nonce,
            message: Some(message),
        };
        for stream in &state.streams {
            let _ = stream.try_send(Ok(response.clone()));
        }
    }

    /// A delta that changes one route.
    pub(crate) fn change(&self, route: pb::ShardRoute) {
        let delta = {
            let mut state = self.state.lock().unwrap();
            let base_revision = state.snapshot.revision;
            state.snapshot.revision += 1;
            let shard = state
                .snapshot
                .shards
                .iter_mut()
                .find(|s| s.shard_id == route.shard_id);
            *shard.unwrap() = route.clone();
            pb::Delta {
                base_revision,
                revision: base_revision + 1,
                changed: vec![route],
                ..Default::default()
            }
        };
        self.say(Message::Delta(delta));
    }

    /// A delta that says how many replicas must have a write.
    pub(crate) fn set_durability(&self, replicas: u32) {
        self.set(|settings| settings.durability = replicas);
    }

    pub(crate) fn set_hold_budget(&self, ms: u64) {
        self.set(|settings| settings.hold_budget_ms = ms);
    }

    pub(crate) fn hold_back(&self, engine: &str) {
        self.set(|settings| engine.clone_into(&mut settings.held_back));
    }

    fn set(&self, change: impl FnOnce(&mut pb::InstanceSettings)) {
        let delta = {
            let mut state = self.state.lock().unwrap();
            let base_revision = state.snapshot.revision;
            state.snapshot.revision += 1;
            let settings = state.snapshot.settings.get_or_insert_with(Default::default);
            change(settings);
            pb::Delta {
                base_revision,
                revision: base_revision + 1,
                settings: Some(settings.clone()),
                ..Default::default()
            }
        };
        self.say(Message::Delta(delta));
    }

    /// Ends all streams, as a controller that dies.
    pub(crate) fn drop_streams(&self) {
        self.state.lock().unwrap().streams.clear();
    }

    pub(crate) async fn wait_heard(&self, what: &str, mut is: impl FnMut(&Said) -> bool) -> Said {
        wait_for(what, || {
            let mut state = self.state.lock().unwrap();
            let at = state.heard.iter().position(&mut is)?;
            Some(state.heard.remove(at))
        })
        .await
    }

    /// Waits for a report of a shard at a level and epoch.
    pub(crate) async fn wait_level(&self, shard: &str, level: pb::HoldLevel, epoch: u64) {
        let is = |said: &Said| match said {
            Said::Report(report) => report
                .shards
                .iter()
                .any(|s| s.shard_id == shard && s.level() == level && s.epoch == epoch),
            _ => false,
        };
        self.wait_heard(&format!("{level:?} of {shard} at {epoch}"), is)
            .await;
    }

    pub(crate) fn holds(&self) -> Vec<pb::HoldSample> {
        let state = self.state.lock().unwrap();
        let reports = state.heard.iter().filter_map(|said| match said {
            Said::Report(report) => Some(report.holds.clone()),
            _ => None,
        });
        reports.flatten().collect()
    }
}

#[tonic::async_trait]
impl TopologyService for Controller {
    type WatchStream = ReceiverStream<Result<pb::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut heard = request.into_inner();
        let (say, stream) = mpsc::channel(64);
        {
            let mut state = self.state.lock().unwrap();
            state.nonce += 1;
            let message = Some(Message::Snapshot(state.snapshot.clone()));
            let _ = say.try_send(Ok(pb::WatchResponse {
                nonce: state.nonce,
                message,
            }));
            state.streams.push(say);
        }
        let state = Arc::clone(&self.state);
        tokio::spawn(async move {
            while let Ok(Some(request)) = heard.message().await {
                let Some(message) = request.message else {
                    continue;
                };
                state.lock().unwrap().heard.push(message);
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
