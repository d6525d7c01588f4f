//! Calls that only the leader can answer, made at a controller that does not lead.
//!
//! What changes something goes to the leader once, as the caller sent it: its deadline, its metadata
//! (a trace's context among them), its bytes; and the leader's answer comes back as it is. What asks
//! for observations goes there too, and is answered from the records when that fails. Whatever the
//! services answer from records alone is theirs.
//!
//! Invariant: a call is handed to a leader at most once, except where it is known that nothing was
//! done; a forwarded call is never forwarded again.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error as _,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use slotmesh_proto::{
    agent::v1::Register,
    peer::v1::{AdmitHostRequest, peer_service_client::PeerServiceClient},
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{
    Code, ConnectError, Status,
    body::Body,
    codegen::http::{HeaderMap, HeaderValue, Request, Response, request::Parts},
    transport::{Channel, Endpoint},
};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service, ServiceExt};
use tracing::{Instrument as _, info, info_span, warn};

use crate::{
    grpc::{Context, ERROR_DOMAIN, NOT_LEADER_HEADER, not_leader},
    leader::{Leader, Leadership},
    store::keys::Key,
    trace,
};

/// How long a change waits for a leader: its lease of 5 s, and an election.
const LEADER_WAIT: Duration = Duration::from_secs(6);
/// Between two tries to reach a leader that is gone but not replaced yet.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Of a call without a deadline of its own.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// A leader that is asked what it sees answers at once; else the records must do.
const OBSERVED_LIMIT: Duration = Duration::from_secs(2);
/// What was handed to a leader that leads no more may still be answered for this long.
const FAREWELL: Duration = Duration::from_millis(300);
/// As tonic's own limit of one message, and its frame.
const BODY_BYTES_MAX: usize = (4 << 20) + 1024;
/// A copy of the records is milliseconds behind, unless others write much to the same etcd.
const CAUGHT_UP_LIMIT: Duration = Duration::from_millis(500);
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A leader that hangs is noticed within two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Kept connections; controllers come and go with new ports.
const CHANNELS_MAX: usize = 16;

/// On a forwarded call: the controller that forwarded it. Whoever gets it does not forward it again.
const FORWARDED_HEADER: &str = "slotmesh-forwarded-by";
/// On its answer: the store's revision that the leader has seen, so that the caller's next read at
/// the controller that forwarded it shows what it has done.
const REVISION_HEADER: &str = "slotmesh-revision";
const TIMEOUT_HEADER: &str = "grpc-timeout";

/// What a call needs of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Only the leader may do it.
    Change,
    /// The leader sees what records do not say.
    Observed,
    /// Records say it all.
    Records,
}

/// Methods whose answer holds more than records.
const OBSERVED: [&str; 6] = [
    "DescribeEngineVersion",
    "DescribeInstances",
    "DescribeInstanceShards",
    "GetTask",
    "ListHosts",
    "ListProxies",
];

/// `None` for what is not asked by users.
fn kind(path: &str) -> Option<Kind> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let ours = matches!(
        service,
        "slotmesh.instance.v1.InstanceService"
            | "slotmesh.task.v1.TaskService"
            | "slotmesh.fleet.v1.FleetService"
            | "slotmesh.artifact.v1.ArtifactService"
    );
    if !ours {
        return None;
    }
    if OBSERVED.contains(&method) {
        return Some(Kind::Observed);
    }
    let reads = ["Describe", "List", "Get", "Watch"];
    // A method that is none of these changes something: none is forgotten when one is added.
    let is_read = reads.iter().any(|prefix| method.starts_with(prefix));
    Some(if is_read { Kind::Records } else { Kind::Change })
}

/// Connections to other controllers, opened when they are first used.
#[derive(Clone, Debug, Default)]
pub struct Leaders {
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl Leaders {
    fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .tcp_nodelay(true)
            .connect_lazy();
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Address of another agent that has a session as this host, as the leader knows; `None` also
    /// when it does not answer: then it says so when it is told of the session.
    pub(crate) async fn other_agent(&self, leader: &str, register: &Register) -> Option<String> {
        let mut client = PeerServiceClient::new(self.channel(leader).ok()?);
        let request = AdmitHostRequest {
            register: Some(register.clone()),
        };
        match timeout(CONNECT_TIMEOUT, client.admit_host(request)).await {
            Ok(Ok(answer)) => Some(answer.into_inner().other_address).filter(|a| !a.is_empty()),
            Ok(Err(status)) => {
                warn!(leader, error = status.message(), "session admitted unasked");
                None
            }
            Err(_) => {
                warn!(leader, "session admitted unasked: the leader is silent");
                None
            }
        }
    }
}

/// Puts [`Forward`] around the services.
#[derive(Clone, Debug)]
pub struct ForwardLayer {
    context: Context,
}

impl ForwardLayer {
    /// The layer over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

impl<S> Layer<S> for ForwardLayer {
    type Service = Forward<S>;

    fn layer(&self, inner: S) -> Forward<S> {
        Forward {
            inner,
            context: self.context.clone(),
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Forward<S> {
    inner: S,
    context: Context,
}

impl<S> Service<Request<Body>> for Forward<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let next = self.inner.clone();
        // The one that was made ready.
        let mut inner = std::mem::replace(&mut self.inner, next);
        match kind(request.uri().path()) {
            None => Box::pin(inner.call(request)),
            Some(Kind::Change) => Box::pin(traced(self.context.clone(), inner, request)),
            Some(kind) => Box::pin(serve(self.context.clone(), inner, kind, request)),
        }
    }
}

/// A change, with a trace id: the same here, at the leader, and in what is written.
async fn traced<S>(
    context: Context,
    inner: S,
    mut request: Request<Body>,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let trace_id = trace::of(request.headers_mut());
    let span = info_span!("change", trace_id);
    let served = serve(context, inner, Kind::Change, request);
    trace::scope(trace_id, served).instrument(span).await
}

async fn serve<S>(
    context: Context,
    mut inner: S,
    kind: Kind,
    request: Request<Body>,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    if kind == Kind::Records {
        return from_records(&context, inner, request).await;
    }
    let was_forwarded = request.headers().contains_key(FORWARDED_HEADER);
    if was_forwarded || context.leading().is_ok() {
        let mut answer = inner.call(request).await?;
        if was_forwarded {
            let revision = context.mirror.read(|s| s.revision);
            answer
                .headers_mut()
                .insert(REVISION_HEADER, HeaderValue::from(revision));
        }
        return Ok(answer);
    }
    let call = match Call::read(request).await {
        Ok(call) => call,
        Err(status) => return Ok(status.into_http()),
    };
    let leader_by = call.until.min(Instant::now() + LEADER_WAIT);
    let mut leadership = context.leadership.clone();
    loop {
        let known = leadership.borrow_and_update().clone();
        let leader = match known {
            Leadership::Leading { .. } => return inner.call(call.request()).await,
            Leadership::Following { leader, .. } => leader,
        };
        if let Some(leader) = &leader {
            match (call.ask(&context, leader, kind).await, kind) {
                (Outcome::Answered(answer), _) => return Ok(answer),
                (Outcome::Lost, Kind::Change) => return Ok(lost(leader).into_http()),
                (Outcome::Lost | Outcome::NotTaken, _) => {}
            }
        }
        if kind == Kind::Observed {
            return inner.call(call.request()).await;
        }
        if Instant::now() >= leader_by {
            let address = leader.as_ref().map(|l| l.address.as_str());
            return Ok(not_leader(address).into_http());
        }
        let again = leader_by.min(Instant::now() + RETRY_PAUSE);
        let _ = timeout_at(again, leadership.changed()).await;
    }
}

/// Answers from this controller's copy of the records. What is not there may have been made at
/// another controller a moment ago: then the copy is given the time to show it.
async fn from_records<S>(
    context: &Context,
    mut inner: S,
    request: Request<Body>,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let call = match Call::read(request).await {
        Ok(call) => call,
        Err(status) => return Ok(status.into_http()),
    };
    let answer = inner.call(call.request()).await?;
    let missing = i32::from(Code::NotFound).to_string();
    let status = answer.headers().get("grpc-status");
    if status.is_none_or(|status| status.as_bytes() != missing.as_bytes()) {
        return Ok(answer);
    }
    let caught_up = async {
        if let Ok(now) = context.store.list(&Key::Leader.to_string()).await {
            context.mirror.shows(now.revision).await;
        }
    };
    // Shown or not, what is asked for may be there now.
    let _ = timeout(CAUGHT_UP_LIMIT, caught_up).await;
    inner.ready().await?.call(call.request()).await
}

/// The leader had it, and is gone: whether it was done, nobody here knows.
fn lost(leader: &Leader) -> Status {
    info!(leader = leader.address, "the leader was lost with a call");
    let details = ErrorDetails::with_error_info("LEADER_LOST", ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(
        Code::Unavailable,
        "the leader was lost while it had this call, so it may or may not have been done: repeat it \
         with the same client_token, or look first",
        details,
    )
}

/// What became of a try.
enum Outcome {
    Answered(Response<Body>),
    /// Nothing was done.
    NotTaken,
    /// It may have been done.
    Lost,
}

/// One call, kept whole so that it can be given to whoever leads.
struct Call {
    parts: Parts,
    body: Bytes,
    /// The caller's deadline.
    until: Instant,
}

impl Call {
    async fn read(request: Request<Body>) -> Result<Self, Box<Status>> {
        let limit = deadline(request.headers()).unwrap_or(CALL_LIMIT);
        let until = Instant::now() + limit;
        let (mut parts, body) = request.into_parts();
        parts.headers.remove("content-length");
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| Box::new(Status::out_of_range(error.to_string())))?;
        Ok(Self {
            parts,
            body: body.to_bytes(),
            until,
        })
    }

    fn request(&self) -> Request<Body> {
        let body = Body::new(Full::new(self.body.clone()));
        Request::from_parts(self.parts.clone(), body)
    }

    async fn ask(&self, context: &Context, leader: &Leader, kind: Kind) -> Outcome {
        let Ok(mut channel) = context.leaders.channel(&leader.address) else {
            return Outcome::NotTaken;
        };
        let mut request = self.request();
        let until = match kind {
            Kind::Change | Kind::Records => self.until,
            Kind::Observed => self.until.min(Instant::now() + OBSERVED_LIMIT),
        };
        let left = until.saturating_duration_since(Instant::now());
        let headers = request.headers_mut();
        // Whole milliseconds, at most eight digits of them.
        let left_ms = left.as_millis().clamp(1, 99_999_999);
        for (name, value) in [
            (TIMEOUT_HEADER, format!("{left_ms}m")),
            (FORWARDED_HEADER, context.controller_id.clone()),
        ] {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        }
        let mut leadership = context.leadership.clone();
        let answer = async {
            let channel = channel.ready().await?;
            channel.call(request).await
        };
        let deposed = async {
            let _ = leadership.wait_for(|l| l.leader() != Some(leader)).await;
            sleep(FAREWELL).await;
        };
        let answer = tokio::select! {
            answer = timeout_at(until, answer) => answer,
            () = deposed => return Outcome::Lost,
        };
        match answer {
            Ok(Ok(answer)) if answer.headers().contains_key(NOT_LEADER_HEADER) => Outcome::NotTaken,
            Ok(Ok(answer)) => Outcome::Answered(seen(context, answer).await),
            Ok(Err(error)) if never_sent(&error) => Outcome::NotTaken,
            Ok(Err(error)) => {
                warn!(leader = leader.address, error = %error, source = ?error.source(), "forwarded call lost");
                Outcome::Lost
            }
            Err(_) => Outcome::Lost,
        }
    }
}

/// Waits until this controller shows what the leader had seen.
async fn seen(context: &Context, mut answer: Response<Body>) -> Response<Body> {
    let revision = answer.headers_mut().remove(REVISION_HEADER);
    let revision = revision.and_then(|r| r.to_str().ok()?.parse().ok());
    if let Some(revision) = revision {
        context.mirror.shows(revision).await;
    }
    answer
}

/// True if not a byte of the call can have reached anybody.
fn never_sent(error: &tonic::transport::Error) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        // Cancelled: the connection was closed before it took the request.
        let cancelled = error.downcast_ref::<hyper::Error>();
        if error.is::<ConnectError>() || cancelled.is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        source = error.source();
    }
    false
}

/// The caller's `grpc-timeout`: up to eight digits and a unit.
fn deadline(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT_HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_is_the_leaders_and_what_records_say_is_anybodys() {
        let of = |service: &str, method: &str| kind(&format!("/slotmesh.{service}/{method}"));
        let instances = "instance.v1.InstanceService";
        for method in [
            "CreateInstance",
            "DeleteInstance",
            "SwitchOver",
            "FailOver",
            "UpdateParameters",
            "UpdateAccounts",
            "SetDurability",
        ] {
            assert_eq!(of(instances, method), Some(Kind::Change), "{method}");
        }
        let tasks = "task.v1.TaskService";
        for method in ["CancelTask", "RescheduleTask", "ResolveTask"] {
            assert_eq!(of(tasks, method), Some(Kind::Change), "{method}");
        }
        assert_eq!(of(tasks, "GetTask"), Some(Kind::Observed));
        for method in ["ListTasks", "WatchTask", "ListEpochs"] {
            assert_eq!(of(tasks, method), Some(Kind::Records), "{method}");
        }
        assert_eq!(of(instances, "DescribeAccounts"), Some(Kind::Records));
        assert_eq!(of(instances, "DescribeInstances"), Some(Kind::Observed));
        assert_eq!(
            of("fleet.v1.FleetService", "ListHosts"),
            Some(Kind::Observed)
        );
        assert_eq!(
            of("fleet.v1.FleetService", "GetLeader"),
            Some(Kind::Records)
        );
        assert_eq!(of("agent.v1.ControlService", "CommitHandover"), None);
        assert_eq!(kind("/grpc.health.v1.Health/Check"), None);
    }

    #[test]
    fn a_callers_deadline_is_read_in_every_unit_and_nonsense_is_none() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT_HEADER, HeaderValue::from_str(text).unwrap());
            deadline(&headers)
        };
        assert_eq!(of("2S"), Some(Duration::from_secs(2)));
        assert_eq!(of("1500m"), Some(Duration::from_millis(1_500)));
        assert_eq!(of("1H"), Some(Duration::from_secs(3_600)));
        for nonsense in ["", "S", "1", "-1S", "123456789S", "1x"] {
            assert_eq!(of(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(deadline(&HeaderMap::new()), None);
    }
}
