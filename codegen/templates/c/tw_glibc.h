/* Binds functions to the versions that glibc 2.28 has.

   A library linked against a newer glibc asks for the newest version of each symbol and then fails to load on an older
   system: threads moved into libc in 2.34, exp and log lost their error wrappers in 2.29. The old versions are still
   served everywhere. The toolchain includes this file first when it compiles with the system's own C library; a name
   that a source does not use leaves no trace in its object. */
#ifndef TW_GLIBC_H
#define TW_GLIBC_H

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
#define TW_BIND(name, version) __asm__(".symver " #name ", " #name "@GLIBC_" #version)
TW_BIND(pthread_create, 2.2.5);
TW_BIND(pthread_join, 2.2.5);
TW_BIND(pthread_detach, 2.2.5);
TW_BIND(pthread_once, 2.2.5);
TW_BIND(pthread_key_create, 2.2.5);
TW_BIND(pthread_key_delete, 2.2.5);
TW_BIND(pthread_getspecific, 2.2.5);
TW_BIND(pthread_setspecific, 2.2.5);
TW_BIND(pthread_mutex_trylock, 2.2.5);
TW_BIND(pthread_attr_setstacksize, 2.2.5);
TW_BIND(pthread_sigmask, 2.2.5);
TW_BIND(pthread_kill, 2.2.5);
TW_BIND(pthread_setaffinity_np, 2.3.4);
TW_BIND(pthread_getaffinity_np, 2.3.4);
TW_BIND(sem_init, 2.2.5);
TW_BIND(sem_destroy, 2.2.5);
TW_BIND(sem_post, 2.2.5);
TW_BIND(sem_wait, 2.2.5);
TW_BIND(exp, 2.2.5);
TW_BIND(exp2, 2.2.5);
TW_BIND(log, 2.2.5);
TW_BIND(log2, 2.2.5);
TW_BIND(pow, 2.2.5);
TW_BIND(fmod, 2.2.5);
TW_BIND(fmodf, 2.2.5);
#undef TW_BIND
#endif

#endif
