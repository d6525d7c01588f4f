//! Connections that say nothing: by far the most of those that a proxy has.
//!
//! Invariant: between the first and the last question nothing is sent on them, so what they are at the
//! end has come through every hand-over untouched.

use tokio::task::JoinSet;

use super::{
    book::{Book, Books, Kind},
    wire::Wire,
};

/// Connections that are made, or asked, at a time: fewer than a proxy's queue of new ones.
const AT_A_TIME: usize = 100;

#[derive(Debug)]
struct One {
    wire: Wire,
    id: String,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Idle {
    all: Vec<Option<One>>,
    book: Book,
}

impl Idle {
    /// Makes the connections, and asks each who it is.
    ///
    /// # Errors
    /// When one can't be made.
    pub(super) async fn connect(
        address: &str,
        count: usize,
        books: &Books,
    ) -> anyhow::Result<Self> {
        let book = books.of(Kind::Idle);
        let (mut all, mut coming) = (Vec::with_capacity(count), JoinSet::new());
        for _ in 0..count {
            if coming.len() >= AT_A_TIME
                && let Some(come) = coming.join_next().await
            {
                all.push(Some(come??));
            }
            let address = address.to_owned();
            coming.spawn(async move {
                let mut wire = Wire::connect(&address).await?;
                let id = wire.id().await?;
                anyhow::Ok(One { wire, id })
            });
        }
        while let Some(come) = coming.join_next().await {
            all.push(Some(come??));
        }
        all.iter().for_each(|_| book.connected());
        Ok(Self { all, book })
    }

    /// Looks whether each is still open and has heard nothing, without a word. Who is not is out.
    pub(super) fn look(&mut self) {
        for place in &mut self.all {
            if let Some(one) = place
                && let Err(error) = one.wire.is_quiet()
            {
                self.book.out(one.id.trim_end(), &error);
                *place = None;
            }
        }
    }

    /// Asks each again who it is.
    pub(super) async fn end(self) {
        let mut asked = JoinSet::new();
        for one in self.all.into_iter().flatten() {
            if asked.len() >= AT_A_TIME {
                asked.join_next().await;
            }
            let book = self.book.clone();
            asked.spawn(async move { same(one, &book).await });
        }
        asked.join_all().await;
    }
}

async fn same(mut one: One, book: &Book) {
    let id = one.id.trim_end();
    match one.wire.id().await {
        Ok(now) if now == one.id => match one.wire.is_quiet() {
            Ok(()) => book.intact(),
            Err(error) => book.out(id, &error),
        },
        Ok(now) => book.error(format!("client {id} is called {} now", now.trim_end())),
        Err(error) => book.out(id, &error),
    }
}
