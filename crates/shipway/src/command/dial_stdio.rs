//! `dial-stdio`: standard input and output as a connection to the daemon, for those who reach us
//! through a command.

use shipway_client::Location;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::Address;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use crate::{Persona, connect::ConnectArgs};

pub(crate) async fn run(connect: &ConnectArgs, persona: Persona) -> Result<()> {
    let location = connect.location(persona)?;
    let dialing = async {
        match &location {
            Location::Socket(Address::Unix(path)) => {
                let (read, write) = UnixStream::connect(path)
                    .await
                    .map_err(|e| Fault::io(format!("connect to {location}"), e))?
                    .into_split();
                Ok((
                    Box::new(read) as Box<dyn AsyncRead + Send + Unpin>,
                    Box::new(write) as Box<dyn AsyncWrite + Send + Unpin>,
                ))
            }
            Location::Socket(Address::Tcp(host)) => {
                let (read, write) = TcpStream::connect(host)
                    .await
                    .map_err(|e| Fault::io(format!("connect to {location}"), e))?
                    .into_split();
                Ok((Box::new(read) as _, Box::new(write) as _))
            }
            other => {
                Err(Fault::invalid(format!("invalid address {other} (expected unix:// or tcp://)")))
            }
        }
    };
    let dialed = match connect.patience() {
        Some(limit) => tokio::time::timeout(limit, dialing).await.map_err(|_| {
            Fault::new(Code::DeadlineExceeded, format!("connect to {location}: no answer in time"))
        })?,
        None => dialing.await,
    };
    let (mut from, mut to) = dialed?;
    let failed = |e| Fault::io("pass bytes between standard streams and the daemon", e);
    let up = async {
        tokio::io::copy(&mut tokio::io::stdin(), &mut to).await?;
        to.shutdown().await?;
        // What the daemon still says is waited for; its end is ours.
        std::future::pending::<std::io::Result<()>>().await
    };
    let down = async {
        let mut out = tokio::io::stdout();
        tokio::io::copy(&mut from, &mut out).await?;
        out.flush().await
    };
    tokio::select! {
        done = up => done.map_err(failed),
        done = down => done.map_err(failed),
    }
}
